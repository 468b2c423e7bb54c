"""What every recipe is configured by, and how it starts: the run's folder, the data, the engine, the loop."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.data import DataConfig, LoaderSpec, TrainLoader
from mmcore.train.engine import Engine, EngineConfig, Precision, deepspeed_config
from mmcore.train.loop import Loop
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups
from mmcore.train.run import Metrics, RunConfig, Start, check_settings
from mmcore.train.state import read_loader, read_state, restore_engine


@dataclass(frozen=True)
class Recipe:
    """What the recipes have in common."""

    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def lr_scales(self) -> dict[str, float]:
        """What --lr is multiplied by for some weights, by the begin of their names."""
        return {}

    @property
    def per_rank(self) -> int:
        """Samples a rank and optimizer step."""
        return self.run.batch_size * self.run.accum

    def loader_spec(self, image_size: int, rank: int, world_size: int) -> LoaderSpec:
        """How a rank reads the data."""
        return LoaderSpec(
            image_size=image_size,
            batch_size=self.per_rank,
            rank=rank,
            world_size=world_size,
            seed=self.run.seed,
            workers=self.data.workers,
        )

    def deepspeed(self, world_size: int) -> tuple[dict[str, Any], Precision]:
        """DeepSpeed's JSON, and the precision it stands for."""
        return deepspeed_config(self.engine, self.optim, batch_size=self.per_rank, world_size=world_size)

    def settings(self, world_size: int) -> dict[str, Any]:
        """All of them as JSON, to be kept with the run."""
        settings = json.loads(json.dumps(asdict(self), default=str))
        settings["global batch"] = self.per_rank * world_size
        return settings


def write_folder(
    name: str,
    recipe: Recipe,
    start: Start,
    world_size: int,
    save: Callable[[Path], dict[str, Any]],
) -> Start:
    """Writes a run's folder, once: settings, what `save` puts there, and the model's shape that it returns; of a run
    that is resumed, compares the settings. Rank 0 alone calls it, when all else has been checked."""
    recipe.deepspeed(world_size)
    settings = recipe.settings(world_size)
    if start.checkpoint is not None:
        check_settings(json.loads((start.folder / "config.json").read_text())["settings"], settings)
        return start
    start.folder.mkdir(parents=True, exist_ok=recipe.run.resume is not None)
    saved = {"recipe": name, "settings": settings, "model": save(start.folder)}
    checkpoint.write_json(start.folder / "config.json", saved)
    return start


def make_engine(recipe: Recipe, start: Start, model: nn.Module, world_size: int) -> Engine:
    """The model's trainable weights under DeepSpeed, as a checkpoint left them where there is one."""
    groups = param_groups(model, recipe.optim.weight_decay, recipe.lr_scales)
    optimizer = make_optimizer(groups, recipe.optim)
    resolved, precision = recipe.deepspeed(world_size)
    if dist.get_rank() == 0:
        checkpoint.write_json(start.folder / "deepspeed.json", resolved)
    engine = Engine(model, optimizer, resolved, precision)
    if start.checkpoint is not None:
        restore_engine(engine, start.checkpoint)
    return engine


def first_step(start: Start, loader: TrainLoader) -> int:
    """The steps done; the loader goes on behind them."""
    if start.checkpoint is None:
        return 0
    loader.load_state_dict(read_loader(start.checkpoint))
    return read_state(start.checkpoint)["step"]


class Named(Protocol):
    """What the first line of a run says of its data."""

    @property
    def name(self) -> str: ...
    @property
    def num_train(self) -> int: ...


Backward = Callable[[Engine, int, Any], dict[str, Tensor]]
"""Of a step's number and batch: makes the gradients, returns the losses by name, their sum as "loss"."""


def run_recipe(
    recipe: Recipe,
    start: Start,
    what: str,
    model: nn.Module,
    data: Named,
    loader: TrainLoader,
    *,
    backward: Backward,
    evaluate: Callable[[Engine], dict[str, float]],
) -> list[dict[str, Any]]:
    """Trains a model from where `start` says; every rank alike.

    Args:
        recipe: how.
        start: the run's folder, and the checkpoint whose weights `model` has.
        what: is trained, for the run's first line.
        model: whose weights that want a gradient are trained.
        data, loader: on what.
        backward: a step's losses and gradients.
        evaluate: numbers by name, the first of which, in [0, 1], the progress bar shows, or none; called in evaluation
            mode.

    Returns:
        The records of metrics.jsonl on rank 0, none elsewhere.
    """
    first = first_step(start, loader)
    world_size = dist.get_world_size()
    engine = make_engine(recipe, start, model, world_size)
    total = recipe.run.steps or recipe.run.epochs * loader.steps_per_epoch

    def evaluated() -> dict[str, float]:
        with engine.eval():
            return evaluate(engine)

    options = {"tensorboard": recipe.run.tensorboard, "active": dist.get_rank() == 0}
    with Metrics(start.folder, total, first, **options) as metrics:
        num_parameters = sum(engine.shards.numel(name) for name in engine.params)
        metrics.say(
            f"training {what} ({num_parameters / 1e6:.1f} M parameters) on {data.name}: {data.num_train} pairs, "
            f"{total - first} steps of {loader.spec.global_batch} pairs, ZeRO {engine.stage}, {engine.precision}, "
            f"{world_size} rank{'s' * (world_size > 1)}"
        )
        Loop(
            start.folder,
            recipe.run,
            recipe.optim,
            engine,
            loader,
            metrics,
            total,
            partial(backward, engine),
            evaluated,
        )(first)
    engine.close()
    return metrics.records
