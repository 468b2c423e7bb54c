"""`python -m bench.gpu FOLDER [--seconds N] [--more] [--plan]`: all that a GPU is wanted for, in one folder and a
bounded time, in the order of what says most.

The device's facts, first compiles, a smoke of every op, kernel times with other launch rows beside them, the kernels'
tests, the benchmarks and their report. A phase has what those before it left of the time until its end, one that is
stopped leaves what it had: results are written as they come.
"""

import argparse
import sys
from pathlib import Path

from bench.gpu.phases import budget, phases, run, run_all


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu"))
    parser.add_argument("--seconds", type=float, help="of all phases; default their plan's")
    parser.add_argument("--more", action="store_true", help="also compile, flex, peers, layers and training steps")
    parser.add_argument("--plan", action="store_true", help="say what would run, and until when")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    plan = phases(folder, more=options.more)
    seconds = options.seconds or plan[-1].until_s
    print(budget(plan, seconds), flush=True)
    if options.plan:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    # lines are added to: an earlier run's are not this one's
    for path in [*folder.glob("*.jsonl"), folder / "launch.patch"]:
        path.unlink(missing_ok=True)
    outcomes = run_all(plan, seconds, lambda phase, limit: run(phase, folder, limit), folder / "phases.jsonl")
    for name in ("smoke.log", "times.log"):
        if (folder / name).is_file():
            print(f"\n{name}\n{(folder / name).read_text()}")
    return 0 if all(x.status == "done" for x in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
