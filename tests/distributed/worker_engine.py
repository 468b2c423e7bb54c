"""Trains TwoTower under the engine for a few steps in each setting given, and writes weights, EMA and losses."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmcore import checkpoint
from mmcore.train.engine import Engine, EngineConfig, deepspeed_config, init_distributed
from mmcore.train.gradcache import contrastive_backward
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups
from mmcore.train.state import read_state, restore_engine, save_state
from tests.distributed import tiny
from tests.distributed.launch import finish

OPTIM = OptimConfig(lr=1e-2, ema=0.99)


def make_engine(
    zero: int, precision: str, batch_size: int, folder: str | None, **extra: float
) -> tuple[Engine, int]:
    model, start = tiny.TwoTower(), 0
    if folder:
        model.load_state_dict(dict(checkpoint.tensors(Path(folder), "weight")))
        start = read_state(Path(folder))["step"]
    optimizer = make_optimizer(param_groups(model, OPTIM.weight_decay), OPTIM)
    config = EngineConfig(zero=zero, precision=precision, **extra)  # pyright: ignore[reportArgumentType]
    resolved, p = deepspeed_config(
        config, OPTIM, batch_size=batch_size // dist.get_world_size(), world_size=dist.get_world_size()
    )
    engine = Engine(model, optimizer, resolved, p)
    if folder:
        restore_engine(engine, Path(folder))
    return engine, start


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    rank, world_size = init_distributed()
    results = {}
    for run in arguments["runs"]:
        engine, start = make_engine(run["zero"], run.get("precision", "fp32"), 8, run.get("resume"))
        losses, norms = [], []
        for step in range(start, run["steps"]):
            images, tokens = (tiny.share(x, rank, world_size) for x in tiny.batch(8, step))
            loss = contrastive_backward(engine, images, tokens, tiny.lengths(tokens), run.get("accum", 1))
            losses.append(float(loss))
            norms.append(engine.step(OPTIM.lr))
            if run.get("save_at") == step + 1:
                save_state(engine, Path(run["save"]), step + 1, {"note": "kept"}, {"rank": rank}, keep=2)
        names = list(engine.params)
        state = {key: engine.gather(key, names) for key in ("weight", "ema", "exp_avg_sq")}
        if rank == 0:
            torch.save(state, folder / f"{run['id']}.pt")
        results[run["id"]] = {"losses": losses, "norms": norms}
        engine.close()
    finish(folder, results)


main()
