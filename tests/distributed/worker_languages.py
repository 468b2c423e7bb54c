"""Trains models with a language model under the engine, in each setting given; the last rank has no images."""

from pathlib import Path
from typing import Any

import torch

from mmcore import checkpoint
from mmcore.train.config import EngineConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.optim import make_optimizer
from mmcore.train.state import save_state
from tests.distributed import languages
from tests.distributed.languages import OPTIM
from tests.distributed.launch import serve


def trained(run: dict[str, Any], folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    model = languages.model_of(run)
    if "rates" in run:
        model.set_activation_checkpointing(True)
    optimizer, shape = make_optimizer(languages.groups_of(run, model), OPTIM), getattr(model, "config", None)
    config = EngineConfig(zero=run["zero"], precision=run.get("precision", "fp32"))
    size = languages.B // world_size
    resolved, precision = deepspeed_config(config, OPTIM, batch_size=size, world_size=world_size)
    engine, losses = Engine(model, optimizer, resolved, precision), []
    for step in range(run["steps"]):
        losses.append(languages.backward(run, engine, shape, step, rank))
        engine.step(OPTIM.lr)
    with engine.eval():
        ids = languages.answers(run, engine, shape, range(rank, rank + 1))
    state = {key: engine.gather(key, list(engine.params)) for key in ("weight", "ema")}
    names = set()
    if run["system"] == "blip2":
        saved = save_state(engine, folder / run["id"], run["steps"], {}, {}, keep=1)
        names = {name for key in ("weight", "ema") for name, _ in checkpoint.tensors(saved, key)}
    if rank == 0:
        torch.save(state, folder / f"{run['id']}.pt")
    engine.close()
    return {
        "losses": losses,
        "ids": ids,
        "trained": sum(p.numel() for flats in optimizer.param_groups for p in flats["params"]),
        "saved": sorted(names),
        "language": sorted({str(p.dtype) for p in model.language_model.parameters()}),
    }


def main(folder: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    ranks = init_distributed()
    return {run["id"]: trained(run, folder, *ranks) for run in runs}


serve(main)
