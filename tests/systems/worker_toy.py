"""Trains the toy recipe: whole, stopped half-way, and resumed, on as many ranks as there are."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmcore import checkpoint
from mmcore.train.config import EngineConfig, RunConfig
from mmcore.train.engine import init_distributed
from mmcore.train.optim import OptimConfig
from mmcore.train.trainer import train
from tests.distributed.launch import finish
from tests.systems.toy import Toy

STEPS = 6


def recipe(out: Path, zero: Any, resume: str | None = None, queue_size: int = 32) -> Toy:
    size = 16 // dist.get_world_size()
    run = RunConfig(out, resume, steps=STEPS, batch_size=size, save_every=3, keep=9, log_every=1, eval_every=99)
    optim = OptimConfig(optimizer="sgd", lr=0.1, weight_decay=1e-3)
    return Toy(run, optim, EngineConfig(zero=zero, precision="fp32"), queue_size=queue_size)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    rank, _ = init_distributed()
    result: dict[str, Any] = {}
    for zero in arguments["stages"]:
        for name, source in (("whole", None), ("resumed", folder / f"whole-{zero}"), ("moved", arguments.get("from"))):
            out = folder / f"{name}-{zero}"
            if name != "whole" and source is None:
                continue
            if source is not None and rank == 0:
                shutil.copytree(source, out)
                shutil.rmtree(checkpoint.step_folder(out / "checkpoints", STEPS))
            dist.barrier()
            train("toy", recipe(out, zero, "latest" if source else None), is_quiet=True)
            result[out.name] = losses(out)
    if arguments.get("refused"):
        try:
            train("toy", recipe(folder / "whole-1", 1, "latest", queue_size=16), is_quiet=True)
        except ValueError as error:
            result["refused"] = str(error)
    finish(folder, result)


if __name__ == "__main__":
    main()
