"""Measures runs on their held-out data as training does, shared among the ranks; one process makes them first."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from mmcore.data import EvalSet
from mmcore.data.broken import BrokenRecord
from mmcore.launch import parse
from mmcore.runs import read_run
from mmcore.tasks import Subject, follow
from mmcore.tasks.ranks import Ranks
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.optim import make_optimizer, param_groups
from mmcore.train.trainer import train
from tests.distributed.launch import serve

FEW = "--data digits --steps 3 --batch-size 64 --lr 1e-3 --warmup 0 --eval-every 9"
MADE = {
    "clip": ("clip", ""),
    "mae": ("mae", ""),
    "pairs": ("blip2-stage1", "--vision {0}/clip"),
    "captions": ("blip2-stage2", "--from {0}/pairs --llm tiny --llm-steps 20"),
    "answers": ("blip2-stage2", "--from {0}/captions --task vqa"),
    "talks": ("llava-stage1", "--vision {0}/clip --llm {0}/captions/language_model --max-answer 12"),
}


def measured(run: Path, zero: int) -> dict[str, Any]:
    """What a run's tasks find under the engine, and how often the model ran on this rank."""
    trained = read_run(run)
    recipe: Any = trained.recipe
    resolved, _ = deepspeed_config(
        parse("clip", ["--zero", str(zero)], "clip").engine,
        recipe.optim,
        batch_size=8,
        world_size=dist.get_world_size(),
    )
    optimizer = make_optimizer(param_groups(trained.model, recipe.optim, recipe.rules), recipe.optim)
    engine = Engine(trained.model, optimizer, resolved)
    calls: list[int] = []
    engine.module.register_forward_pre_hook(lambda *_: calls.append(1))
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    with engine.eval():
        found = follow(Subject(recipe, trained.assets, engine, recipe.open_data(), engine.device, ranks=ranks))
    engine.close()
    return {"found": found, "calls": len(calls)}


class Squares:
    """Images of one grey level each, of which those in `broken` cannot be read."""

    def __init__(self, broken: set[int]) -> None:
        self.broken = broken

    def sample_id(self, i: int) -> str:
        return f"square {i}"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        BrokenRecord.unless(i not in self.broken, "not a square")
        return Image.new("RGB", (4, 4), (i, i, i))


def squares(broken: set[int], max_broken: float) -> dict[str, Any]:
    """Ten squares, read two at a time; what every rank knows of them, and how many parts this one worked on."""
    val, ranks, worked = EvalSet(Squares(broken), range(10), [[]] * 10, max_broken=max_broken), Ranks(), []
    ranks = Ranks(dist.get_rank(), dist.get_world_size())

    def work(images: list[Image.Image], positions: list[int]) -> list[tuple[int, int]]:
        worked.append(len(images))
        return [(i, image.getpixel((0, 0))[0]) for i, image in zip(positions, images)]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]

    try:
        found = ranks.over(val, 2, work)
    except ValueError as error:
        return {"error": str(error)}
    return {"found": found, "broken": val.broken, "worked": worked}


def main(folder: Path, one: str, zero: int) -> dict[str, Any]:
    _, world_size = init_distributed()
    if world_size == 1:
        for name, (recipe, flags) in MADE.items():
            words = [*FEW.split(), *flags.format(folder).split(), "--out", str(folder / name)]
            train(recipe, parse(recipe, words, recipe), is_quiet=True)
    torch.manual_seed(0)
    result: dict[str, Any] = {name: measured(Path(one) / name, zero) for name in MADE}
    result["squares"] = squares({2, 3, 9}, 0.3)
    result["too many"] = squares({2, 3, 9}, 0.2)
    return result


serve(main)
