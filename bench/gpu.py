"""`python -m bench.gpu FOLDER --seconds N [--dry]`: all that a GPU is wanted for, in one folder and a bounded time.

The device's facts, the kernels' tests on it, the benchmarks and their report. Each phase has a share of the seconds
that are left, what one does not use the next ones have, and a phase that is stopped leaves what it had: benchmarks run
in several processes, each with a file of its own, so that a kernel that breaks the device's context costs one of them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BENCH = Path(__file__).parent
ROOT = BENCH.parent
# modules of bench/ops and files that share a process, with their share of the time; the training steps are all other
# files
GROUPS = {
    "losses": (
        "contrastive contrastive_variants sigmoid distill token_contrastive maxsim statistics",
        "two_ranks",
        5.0,
    ),
    "attention": ("attention positions", "layers", 5.0),
    "lists": ("linear_cross_entropy ema adamw norm ewc packnet", "linear momentum", 4.0),
    "steps": ("", "", 3.0),
}
# of a phase's seconds, those after which it begins no test
BEGIN_SHARE = 0.75
KILL_AFTER_S = 3.0


@dataclass(frozen=True)
class Phase:
    """A command, and its share of the time against those that follow; pytest is told when to begin no test."""

    name: str
    command: tuple[str, ...]
    share: float
    is_pytest: bool = False

    def limited(self, seconds: float) -> list[str]:
        limit = [f"--time-limit={BEGIN_SHARE * seconds:.0f}"] if self.is_pytest else []
        return [*self.command, *limit]


@dataclass(frozen=True)
class Outcome:
    """How a phase ended: "done", "failed" or "stopped"."""

    name: str
    status: str
    seconds: float


def phases(folder: Path) -> list[Phase]:
    """In their order."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "bench.deadline", "--continue-on-collection-errors")
    tests = (*pytest, "tests/kernels", "-m", "gpu", f"--junitxml={folder / 'tests.xml'}")
    found = [
        Phase("facts", (python, "-m", "bench.gpu_facts", str(folder / "facts.txt")), 1.0),
        Phase("tests", tests, 7.0, is_pytest=True),
    ]
    every = {path.stem.removeprefix("test_"): path for path in sorted(BENCH.glob("test_*.py"))}
    of_ops = every.pop("ops")
    for group, (ops, names, share) in GROUPS.items():
        chosen = [every.pop(name) for name in names.split()] or list(every.values())
        if ops:
            chosen.insert(0, of_ops)
        files = (*(str(path.relative_to(ROOT)) for path in chosen), *(f"--op={op}" for op in ops.split()))
        # of ops what is claimed is of CPUs, of steps of GPUs too
        claims = ["--claims"] if group == "steps" else []
        command = (*pytest, *files, *claims, f"--benchmark-json={folder / f'{group}.json'}")
        found.append(Phase(group, command, share, is_pytest=True))
    return [*found, Phase("report", (python, "-m", "bench", "report", str(folder)), 0.8)]


def run(phase: Phase, folder: Path, seconds: float) -> str:
    """Runs the phase, its output in a log; one that takes longer is asked to end, then ended."""
    with (folder / f"{phase.name}.log").open("w") as log:
        process = subprocess.Popen(
            phase.limited(seconds), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            # pytest writes its reports when it is interrupted
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return "stopped"


def run_all(
    plan: Sequence[Phase],
    seconds: float,
    run_phase: Callable[[Phase, float], str],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs the phases one after the other, in no more than the seconds given; a failed one stops none of the rest."""
    began, outcomes = clock(), []
    for i, phase in enumerate(plan):
        left = seconds - (clock() - began) - KILL_AFTER_S
        allowed = left * phase.share / sum(later.share for later in plan[i:])
        phase_began = clock()
        status = run_phase(phase, allowed) if allowed > 1 else "not begun"
        outcomes.append(Outcome(phase.name, status, clock() - phase_began))
        print(f"{phase.name}: {status} after {outcomes[-1].seconds:.0f} of {allowed:.0f} s", flush=True)
    return outcomes


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--dry", action="store_true", help="say what would run, and for how long")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    plan = phases(folder)
    if options.dry:
        run_all(plan, options.seconds, lambda phase, limit: print(*phase.limited(limit)) or "dry")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(plan, options.seconds, lambda phase, limit: run(phase, folder, limit))
    (folder / "phases.txt").write_text(json.dumps([asdict(x) for x in outcomes], indent=1) + "\n")
    return 0 if all(x.status == "done" for x in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
