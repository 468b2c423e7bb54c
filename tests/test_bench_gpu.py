"""`make gpu` keeps its time: each phase has its share, and none takes the others with it."""

import pkgutil
import sys
import time
from pathlib import Path

from bench.gpu import BENCH, KILL_AFTER_S, Outcome, Phase, phases, run, run_all

SECONDS = 520.0


class Clock:
    """Time that passes as phases use it."""

    def __init__(self, used_shares: dict[str, float]) -> None:
        self.now, self.used_shares, self.allowed = 100.0, used_shares, {}

    def __call__(self) -> float:
        return self.now

    def run(self, phase: Phase, seconds: float) -> str:
        self.allowed[phase.name] = seconds
        used = self.used_shares.get(phase.name, 1.0)
        self.now += min(used * seconds, seconds + KILL_AFTER_S)
        return "stopped" if used > 1 else "done"


def run_with(used_shares: dict[str, float], tmp_path: Path) -> tuple[Clock, list[Outcome]]:
    clock = Clock(used_shares)
    return clock, run_all(phases(tmp_path), SECONDS, clock.run, clock)


def test_all_phases_together_keep_the_seconds_even_where_all_are_stopped(tmp_path: Path) -> None:
    plan = phases(tmp_path)
    clock, outcomes = run_with({phase.name: 1.001 for phase in plan}, tmp_path)
    assert [x.name for x in outcomes] == [phase.name for phase in plan]
    assert {x.status for x in outcomes} == {"stopped"}
    assert clock.now - 100.0 <= SECONDS
    assert clock.allowed["report"] >= 10


def test_the_benchmarks_are_all_of_them_each_once_and_pytest_ends_before_it_is_stopped(tmp_path: Path) -> None:
    words = [x for phase in phases(tmp_path) for x in phase.command]
    of_ops, chosen = "bench/test_ops.py", [x for x in words if x.startswith("bench/test_")]
    assert sorted(x for x in chosen if x != of_ops) == [
        f"bench/{path.name}" for path in sorted(BENCH.glob("test_*.py")) if path.name != "test_ops.py"
    ]
    ops = [x.removeprefix("--op=") for x in words if x.startswith("--op=")]
    assert sorted(ops) == sorted(found.name for found in pkgutil.iter_modules([str(BENCH / "ops")]))
    asking = [phase for phase in phases(tmp_path) if any(x.startswith("--op=") for x in phase.command)]
    assert chosen.count(of_ops) == len(asking) and all(of_ops in phase.command for phase in asking)
    asserting = [phase for phase in phases(tmp_path) if "--claims" in phase.command]
    assert [phase.name for phase in asserting] == ["steps"] and "bench/test_llava.py" in asserting[0].command
    for phase in phases(tmp_path):
        if phase.is_pytest:
            assert float(phase.limited(100.0)[-1].removeprefix("--time-limit=")) <= 80


def phase_of(code: str) -> Phase:
    return Phase("phase", (sys.executable, "-S", "-c", code), 1.0)


def test_a_phase_leaves_its_log_and_says_how_it_ended(tmp_path: Path) -> None:
    assert run(phase_of("print('written')"), tmp_path, 60.0) == "done"
    assert (tmp_path / "phase.log").read_text() == "written\n"
    assert run(phase_of("raise SystemExit(3)"), tmp_path, 60.0) == "failed"


def test_a_phase_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    assert run(phase_of(code), tmp_path, 4.0) == "stopped"
    child = Path("/proc") / (tmp_path / "phase.log").read_text().split()[0] / "stat"
    for _ in range(50):
        # gone, or dead and not yet collected
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child still runs")
