"""Phases of a run on a GPU: what is run, and until when."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.lines import append

BENCH = Path(__file__).parents[1]
ROOT = BENCH.parent
# processes that compile, and that test
COMPILERS, TESTERS = 13, 12
# of a phase's seconds, those after which pytest begins no test
BEGIN_SHARE = 0.8
KILL_AFTER_S = 3.0
# modules of bench/ops whose large shapes come first, those with goals before the others
LOSSES = "contrastive sigmoid linear_cross_entropy token_contrastive maxsim late distill"
LISTS = "ema adamw norm ewc packnet positions statistics contrastive_variants"


@dataclass(frozen=True)
class Phase:
    """A command.

    Attributes:
        name: of its log.
        command: pytest is told when to begin no test.
        until_s: of a run that takes its whole time; a phase has what the ones before it left.
        says: what it is for.
    """

    name: str
    command: tuple[str, ...]
    until_s: float
    says: str

    def limited(self, seconds: float) -> list[str]:
        is_pytest = "pytest" in self.command
        return [*self.command, *([f"--time-limit={BEGIN_SHARE * seconds:.0f}"] if is_pytest else [])]


@dataclass(frozen=True)
class Outcome:
    """How a phase ended: "done", "failed", "stopped" or "not begun"."""

    name: str
    status: str
    seconds: float


def phases(folder: Path, *, more: bool = False) -> list[Phase]:
    """In their order: what says most first. `more`: what has to be compiled for minutes or installed, the layers and
    the training steps, after everything else."""
    python, place = sys.executable, str(folder)
    pytest = (python, "-m", "pytest", "-q", "-p", "bench.gpu.running", "--continue-on-collection-errors")

    def bench(name: str, *options: str) -> tuple[str, ...]:
        written = (f"--benchmark-json={folder / f'{name}.json'}", f"--lines={folder / f'{name}.jsonl'}")
        return (*pytest, *options, *written)

    def of_ops(name: str, ops: str, *options: str) -> tuple[str, ...]:
        return bench(name, "bench/test_ops.py", *(f"--op={op}" for op in ops.split()), "--largest-first", *options)

    first = (f"--first={word}" for word in ("contrastive_loss", "sigmoid_loss", "adamw", "linear_cross_entropy"))
    tests = (*pytest, "tests/kernels", "-m", "gpu", "-n", str(TESTERS), "--dist", "load", *first)
    reports = (f"--lines={folder / 'tests.jsonl'}", f"--junitxml={folder / 'tests.xml'}")
    smoke = (python, "-m", "bench.gpu.smoke", place)
    found = [
        Phase("facts", (python, "-m", "bench.gpu.facts", place), 25, "the device, its L2, its memory, its products"),
        Phase("compile", (*smoke, "--compile", str(COMPILERS)), 70, f"first compiles, by {COMPILERS} processes"),
        Phase("smoke", smoke, 95, "every op against float64 at an odd and at a real shape"),
        Phase("times", (python, "-m", "bench.gpu.times", place), 200, "large ops, and other launch rows beside them"),
        Phase("tests", (*tests, *reports), 335, f"the kernels' tests, by {TESTERS} processes"),
        Phase("losses", of_ops("losses", LOSSES, "--plain"), 380, "losses beside eager, large shapes first"),
        Phase("attention", of_ops("attention", "attention", "--plain"), 408, "attention beside SDPA"),
        Phase("lists", of_ops("lists", LISTS, "--plain"), 425, "updates of lists beside torch's"),
    ]
    if shutil.which("ncu"):
        found.append(Phase("ncu", _profiled(python, place), 440, "three kernels under the profiler"))
    if more:
        others = [str(path.relative_to(ROOT)) for path in sorted(BENCH.glob("test_*.py")) if path.stem != "test_ops"]
        found += [
            Phase("more-losses", of_ops("more-losses", LOSSES), 560, "losses beside compile and peers"),
            Phase(
                "more-attention", of_ops("more-attention", "attention"), 660, "attention beside compile, flex and peers"
            ),
            # what is claimed of ops is of CPUs, of steps of GPUs too
            Phase("more-steps", bench("more-steps", *others, "--claims"), 780, "layers and training steps"),
        ]
    report = Phase("report", (python, "-m", "bench", "report", place), found[-1].until_s + 15, "a page, plots, tables")
    return [*found, report]


def _profiled(python: str, place: str) -> tuple[str, ...]:
    sections = [x for name in ("SpeedOfLight", "WarpStateStats", "Occupancy") for x in ("--section", name)]
    kernels = "regex:contrastive_fwd|contrastive_bwd|sigmoid_fwd"
    return ("ncu", "-k", kernels, "-c", "3", *sections, python, "-m", "bench.gpu.times", place, "--once")


def run(phase: Phase, folder: Path, seconds: float) -> str:
    """Runs the phase, its output in a log; one that takes longer is asked to end, then ended."""
    with (folder / f"{phase.name}.log").open("w") as log:
        process = subprocess.Popen(
            phase.limited(seconds),
            cwd=ROOT,
            # many processes share the cores
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            # pytest writes its reports when it is interrupted
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_AFTER_S)
        # children too, which may have outlived it
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "stopped"


def run_all(
    plan: Sequence[Phase],
    seconds: float,
    run_phase: Callable[[Phase, float], str],
    lines: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs the phases one after the other, in no more than the seconds given; a failed one stops none of the rest."""
    began, outcomes = clock(), []
    scale = seconds / plan[-1].until_s
    for phase in plan:
        phase_began = clock()
        allowed = scale * phase.until_s - (phase_began - began) - KILL_AFTER_S
        status = run_phase(phase, allowed) if allowed > 1 else "not begun"
        outcomes.append(Outcome(phase.name, status, clock() - phase_began))
        print(f"{phase.name}: {status} after {outcomes[-1].seconds:.0f} of {allowed:.0f} s", flush=True)
        if lines is not None:
            append(lines, phase=phase.name, status=status, seconds=round(outcomes[-1].seconds, 1))
    return outcomes


def budget(plan: Sequence[Phase], seconds: float) -> str:
    """The plan in seconds, a line a phase."""
    scale, found, before = seconds / plan[-1].until_s, [], 0.0
    for phase in plan:
        found.append(f"{scale * before:5.0f} to {scale * phase.until_s:4.0f} s  {phase.name:15s} {phase.says}")
        before = phase.until_s
    return "\n".join(found)
