"""`python -m bench static [--json] [--arch ARCH ...] [--only WORD]`: compiles the launch tables, reads the machine code
and predicts shares of the roofline; `--json` writes what it finds into bench/results/sm_ARCH-static.

It needs no GPU. `--only` takes rows whose name has the word in it, as `contrastive-fwd-bf16`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from bench.report.static import markdown
from bench.static.compiled import ROWS, row_id
from bench.static.facts import facts
from bench.static.model import ASSUMED, CHIPS, MEMORY_SHARE, TENSOR_SHARE

RESULTS = Path(__file__).parents[1] / "results"
# float16 differs from bfloat16 in nothing that costs
ELEMENTS = ("bf16", "fp32", "i64")


def document(arch: int, only: str = "") -> dict[str, Any]:
    """What the rows of an architecture compile to, and what was assumed to predict from it."""
    rows = [row for row in ROWS if row[1][2] == arch and row[2] in ELEMENTS and only in row_id(*row)]
    return {
        "is_predicted": True,
        "arch": arch,
        "triton": triton.__version__,
        "chip": asdict(CHIPS[arch]),
        "levels": {name: asdict(level) for name, level in ASSUMED.items()},
        "tensor_share": TENSOR_SHARE,
        "memory_share": MEMORY_SHARE,
        "rows": [rounded(facts(row)) for row in rows],
    }


def rounded(value: Any) -> Any:
    """With four digits, which is more than a prediction has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def path_of(arch: int) -> Path:
    return RESULTS / f"sm_{arch}-static" / "static.json"


def write(found: dict[str, Any]) -> Path:
    """A line a row, so that a change of one kernel is a change of its lines."""
    path = path_of(found["arch"])
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(found | {"rows": []}, indent=1).removesuffix("[]\n}")
    path.write_text(head + "[\n" + ",\n".join(json.dumps(row) for row in found["rows"]) + "\n]\n}\n")
    return path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench static", description=__doc__)
    parser.add_argument("--json", action="store_true", help="write bench/results/sm_ARCH-static/static.json")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(CHIPS), help="80, 90, 100; default all")
    parser.add_argument("--only", default="", metavar="WORD", help="rows that have it in their name")
    options = parser.parse_args(arguments)
    if options.json and options.only:
        parser.error("--json writes all rows, which --only leaves out")
    for arch in options.arch or sorted(CHIPS):
        found = document(arch, options.only)
        print(markdown(found), end="\n\n", flush=True)
        if options.json:
            print(write(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
