"""Trains every recipe, as its proof has it but for a few steps: alone, resumed, under each stage on several ranks."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bench.towers import grouped
from mmcore import checkpoint
from mmcore.launch import parse
from mmcore.systems import entries
from mmcore.tasks import features
from mmcore.train.engine import init_distributed
from mmcore.train.trainer import train
from tests.distributed.launch import finish
from tests.systems.toy import Toy

STEPS, BATCH = 4, 32
LEFT_OUT = ("--epochs", "--batch-size", "--llm-steps")
SMALL = f"--steps {STEPS} --log-every 1 --save-every 2 --eval-every 100 --keep 9 --ema 0.9 --lr 3e-3 --warmup 0"


def flags_of(name: str, known: dict[str, Path]) -> list[str]:
    """Those of the recipe's proof, small, from the runs that are there."""
    proof = entries("PROOFS")[name].load()
    earlier = [str(known.get(recipe, "")) for recipe, _ in proof.runs[:-1]]
    flags = grouped(proof.runs[-1][1].format(*earlier))
    return [x for words in flags if words[0] not in SMALL.split() and words[0] not in LEFT_OUT for x in words]


def trained(name: str, flags: list[str], out: Path, *more: object) -> dict[str, Any]:
    size = BATCH // dist.get_world_size()
    words = [*flags, *SMALL.split(), "--batch-size", str(size), "--out", str(out), *map(str, more)]
    if "--llm" in flags and flags[flags.index("--llm") + 1] == "tiny":
        words += ["--llm-steps", "20"]
    train(name, Toy() if name == "toy" else parse(name, words, name), is_quiet=True)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {str(r["step"]): r["loss"] for r in map(json.loads, lines)}


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    _, world_size = init_distributed()
    one = Path(arguments["one"])
    known, result = {name: one / name for name in arguments["names"]}, {}
    features.FOLLOWED = 256  # a probe of all training images takes longer than the steps
    for name in arguments["names"]:
        flags = flags_of(name, known)
        if world_size == 1:
            result[name] = trained(name, flags, one / name)
            shutil.copytree(one / name, one / f"{name}-resumed")
            shutil.rmtree(checkpoint.step_folder(one / f"{name}-resumed/checkpoints", STEPS))
            trained(name, flags, one / f"{name}-resumed", "--resume", "latest")
            continue
        if "--llm" in flags:  # the one that was trained there
            flags[flags.index("--llm") + 1] = str(one / name / "language_model")
        for zero in arguments["stages"][name]:
            result[f"{name} {zero}"] = trained(name, flags, folder / f"{name}-{zero}", "--zero", zero)
    finish(folder, result)


if __name__ == "__main__":
    main()
