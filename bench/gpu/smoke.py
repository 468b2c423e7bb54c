"""`python -m bench.gpu.smoke FOLDER`: every op, forward and backward, held to the contract's bound at an odd shape and
at a real one: a line each in smoke.jsonl.

`--compile N` only runs them, in N processes that share them and the timed rows of `bench.gpu.times`, so that Triton's
cache holds what later phases launch.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.contract import cast_inputs, check, evaluate
from bench.gpu.items import Item, go_on_from, run_items
from bench.gpu.times import row_items
from bench.ops import specs
from bench.spec import OpSpec, Shape, shape_id

# by the axes of a spec's shapes
REAL: dict[str, Shape] = {
    "B D": {"B": 4096, "D": 768},
    "M N D": {"M": 1024, "N": 4096, "D": 768},
    "M N D offset": {"M": 1024, "N": 4096, "D": 768, "offset": 512},
    "M Q N D": {"M": 256, "Q": 32, "N": 256, "D": 256},
    "M Q N T D": {"M": 64, "Q": 32, "N": 64, "T": 16, "D": 128},
    "B Lq N Ld D": {"B": 16, "Lq": 32, "N": 64, "Ld": 180, "D": 128},
    "T D V": {"T": 2048, "D": 1024, "V": 32000},
    "B C": {"B": 64, "C": 65536},
    "N L": {"N": 4, "L": 1 << 20},
    "B H Hkv Lq Lk K": {"B": 4, "H": 8, "Hkv": 4, "Lq": 512, "Lk": 1024, "K": 64},
}  # fmt: skip
# what a quarter of an hour is first wanted for
FIRST = ("contrastive_loss", "sigmoid_loss", "adamw_update_", "attention", "linear_cross_entropy")


def shapes_of(spec: OpSpec) -> tuple[Shape, ...]:
    """The contract's last, which is odd, and a real one of the same axes."""
    odd = spec.shapes[-1]
    return odd, next(shape for axes, shape in REAL.items() if set(axes.split()) == set(odd))


def items(device: str, only_runs: bool, chosen: Sequence[OpSpec] | None = None) -> list[Item]:
    """Both shapes of every spec, plain ops before their variants, in bfloat16."""

    def place(spec: OpSpec) -> tuple[bool, int]:
        plain = spec.name.partition("[")[0]
        return "[" in spec.name, FIRST.index(plain) if plain in FIRST else len(FIRST)

    found = []
    for spec in sorted(specs() if chosen is None else chosen, key=place):
        for shape in shapes_of(spec):
            run = _run if only_runs else _check
            name = f"{spec.name} {shape_id(shape)}"
            found.append(Item(name, lambda run=run, spec=spec, shape=shape: run(spec, shape, device)))
    return found


def _check(spec: OpSpec, shape: Shape, device: str) -> dict[str, Any]:
    check(spec, shape, spec.cases[0], torch.bfloat16, device, seeds=range(1))
    return {}


def _run(spec: OpSpec, shape: Shape, device: str) -> dict[str, Any]:
    inputs = cast_inputs(spec.make_inputs(shape, spec.cases[0], torch.bfloat16, 0), device=device)
    evaluate(spec.op, inputs, spec.differentiable)
    return {}


def shown(line: dict[str, Any]) -> str:
    return f"{line['item']:60s} {line['seconds']:7.2f} s  {line['error'] or 'within its bound'}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compile", type=int, metavar="N", help="only run, in N processes")
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="of such a process")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first item")
    options = parser.parse_args(arguments)
    if options.compile:
        again = [sys.executable, "-m", "bench.gpu.smoke", str(options.folder), "--share"]
        shares = [subprocess.Popen([*again, str(i), str(options.compile)]) for i in range(options.compile)]
        return max(share.wait() for share in shares)
    if options.share:
        i, n = options.share
        todo = [*items("cuda", only_runs=True), *row_items()][i::n]
        lines, again, show = options.folder / "compile.jsonl", [str(options.folder), "--share", str(i), str(n)], None
    else:
        todo, again, show = items("cuda", only_runs=False), [str(options.folder)], shown
        lines = options.folder / "smoke.jsonl"
    broken_at = run_items(todo[options.first :], lines, show)
    if broken_at is not None:
        go_on_from("bench.gpu.smoke", options.first + broken_at, again)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
