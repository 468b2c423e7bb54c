"""Trains TwoTower under the engine for a few steps in each setting given, and writes weights, states and losses."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmcore import checkpoint
from mmcore.recipe import Step
from mmcore.systems.clip.recipe import Clip, ClipBatch
from mmcore.train.config import EngineConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups, weight_decay_schedule
from mmcore.train.state import read_state, restore_engine, save_state
from tests.distributed import tiny
from tests.distributed.launch import serve
from tests.waits import Waits


def make_engine(run: dict[str, Any], optim: OptimConfig) -> tuple[Engine, int]:
    model, start = tiny.TwoTower(), 0
    folder = Path(run["resume"]) if "resume" in run else None
    if folder:
        model.load_state_dict(dict(checkpoint.tensors(folder, "weight")))
        start = read_state(folder)["step"]
    rules = tiny.rules(run.get("frozen_until", 0))
    optimizer = make_optimizer(param_groups(model, optim, rules), optim)
    config = EngineConfig(zero=run["zero"], precision=run.get("precision", "fp32"))
    world_size = dist.get_world_size()
    resolved, p = deepspeed_config(config, optim, batch_size=8 // world_size, world_size=world_size)
    engine = Engine(model, optimizer, resolved, p)
    if folder:
        restore_engine(engine, folder)
    return engine, start


def main(folder: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    rank, world_size = init_distributed()
    results = {}
    for run in runs:
        optim = tiny.optim(run.get("optim", {}))
        engine, start = make_engine(run, optim)
        losses, norms, waits = [], [], Waits()
        for step in range(start, run["steps"]):
            images, tokens = (tiny.share(x, rank, world_size) for x in tiny.batch(8, step))
            if step == run.get("poison"):
                images = images * torch.inf
            parts = [
                ClipBatch(a, b, tiny.lengths(b))
                for a, b in zip(*(x.chunk(run.get("accum", 1)) for x in (images, tokens)), strict=True)
            ]
            decay = weight_decay_schedule(optim, tiny.TOTAL)(step)
            lr = optim.lr * run.get("rate", 1.0)
            with waits:
                loss = Clip().backward(engine, parts, Step(step, run["steps"], 0))["loss"]
                norm = engine.step(lr, weight_decay=decay, step=step)
            losses.append(float(loss))
            norms.append(float(norm))
            if run.get("save_at") == step + 1:
                save_state(engine, Path(run["save"]), step + 1, {"note": "kept"}, {"rank": rank}, keep=2)
        names = list(engine.params)
        state = {key: engine.gather(key, names) for key in ("weight", *engine.optimizer.state_keys)}
        if rank == 0:
            torch.save(state, folder / f"{run['id']}.pt")
        results[run["id"]] = {"losses": losses, "norms": norms, "waits": waits.lines}
        try:
            engine.step(optim.lr, step=run["steps"] - 1)
        except ValueError as error:
            results[run["id"]]["error"] = str(error)
        engine.close()
    return results


serve(main)
