"""`make gpu` keeps its time and leaves what it had: each phase has its end, none takes the others with it, an item that
fails is a line, and the launch row that is faster is a patch. A CPU rehearses it."""

import json
import pkgutil
import re
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import facts, smoke, times
from bench.gpu.__main__ import main
from bench.gpu.items import Item, run_items
from bench.gpu.lines import append, read
from bench.gpu.phases import BENCH, KILL_AFTER_S, Outcome, Phase, budget, phases, run, run_all
from bench.gpu.times import FLAGSHIPS, Flagship, candidates, patch, rows_of, table_of
from bench.measure import gemm_flops_per_s
from bench.ops import specs
from bench.static.cases import Case
from bench.static.compiled import compile_kernel
from mmkernels._device import INTERPRETED
from mmkernels._launch import Launch

CPU = torch.device("cpu")


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


def run_with(used: dict[str, float], plan: list[Phase], seconds: float, tmp_path: Path) -> tuple[Clock, list[Outcome]]:
    clock = Clock(used)
    return clock, run_all(plan, seconds, clock.run, tmp_path / "phases.jsonl", clock)


@pytest.mark.parametrize(("more", "planned"), [(False, 480), (True, 840)])
@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_all_phases_together_keep_the_seconds_even_where_all_are_stopped(
    more: bool, planned: float, scale: float, tmp_path: Path
) -> None:
    plan = phases(tmp_path, more=more)
    seconds = scale * plan[-1].until_s
    assert plan[-1].until_s <= planned
    clock, outcomes = run_with({phase.name: 1.001 for phase in plan}, plan, seconds, tmp_path)
    assert [x.name for x in outcomes] == [phase.name for phase in plan]
    assert {x.status for x in outcomes} == {"stopped"}
    assert clock.now - 100.0 <= seconds
    assert [line["phase"] for line in read(tmp_path / "phases.jsonl")] == [x.name for x in outcomes]


def test_a_phase_has_what_the_ones_before_it_left(tmp_path: Path) -> None:
    plan = phases(tmp_path)
    clock, _ = run_with({"compile": 0.1, "smoke": 0.1}, plan, plan[-1].until_s, tmp_path)
    by_name = {phase.name: phase for phase in plan}
    assert clock.allowed["times"] > 1.2 * (by_name["times"].until_s - by_name["smoke"].until_s)


def test_the_order_is_what_says_most_first_and_the_plan_says_until_when(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [x for x in phases(tmp_path, more=True) if x.name != "ncu"]
    assert " ".join(x.name for x in plan) == (
        "facts compile smoke times tests losses attention lists more-losses more-attention more-steps report"
    )
    assert all(x.until_s < y.until_s for x, y in pairwise(plan))
    assert "\n   25 to   70 s  compile " in budget(plan, plan[-1].until_s)
    assert main([str(tmp_path / "none"), "--plan"]) == 0
    assert "every op against float64" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_the_benchmarks_are_all_of_them_and_pytest_ends_before_it_is_stopped(tmp_path: Path) -> None:
    plan = phases(tmp_path, more=True)
    words = [x for phase in plan for x in phase.command]
    of_ops, chosen = "bench/test_ops.py", [x for x in words if x.startswith("bench/test_")]
    assert sorted(x for x in chosen if x != of_ops) == [
        f"bench/{path.name}" for path in sorted(BENCH.glob("test_*.py")) if path.name != "test_ops.py"
    ]
    plain = [x for phase in plan if "--plain" in phase.command for x in phase.command]
    ops = [x.removeprefix("--op=") for x in plain if x.startswith("--op=")]
    assert sorted(ops) == sorted(found.name for found in pkgutil.iter_modules([str(BENCH / "ops")]))
    asserting = [phase for phase in plan if "--claims" in phase.command]
    assert [phase.name for phase in asserting] == ["more-steps"] and "bench/test_llava.py" in asserting[0].command
    (tests,) = [phase for phase in plan if phase.name == "tests"]
    assert tests.command.index("--first=contrastive_loss") < tests.command.index("--first=adamw")
    for phase in plan:
        if "pytest" in phase.command:
            assert float(phase.limited(100.0)[-1].removeprefix("--time-limit=")) <= 80


def phase_of(code: str) -> Phase:
    return Phase("phase", (sys.executable, "-S", "-c", code), 1.0, "")


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


def raising(error: BaseException) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        raise error

    return run


def test_an_item_that_fails_is_a_line_and_what_was_cut_is_none(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    todo = [Item("a", raising(ValueError("D must be 64\nor so"))), Item("b", lambda: {"found": 3})]
    assert run_items(todo, lines, lambda line: line["item"]) is None
    first, second = read(lines)
    assert (first["item"], first["error"]) == ("a", "ValueError: D must be 64")
    assert (second["error"], second["found"]) == (None, 3)
    with lines.open("a") as file:
        file.write('{"item": "cu')
    assert len(read(lines)) == 2 and read(tmp_path / "none") == []


def test_a_context_that_a_kernel_broke_is_left_for_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError("CUDA error: misaligned address")))
    assert run_items([Item("a", dict), Item("b", dict)], tmp_path / "lines.jsonl") == 1
    assert [line["item"] for line in read(tmp_path / "lines.jsonl")] == ["a", "a"]


@pytest.mark.parametrize("share", [[], ["--share", "1", "2"]])
def test_what_is_left_of_the_smoke_is_begun_in_a_new_process(
    share: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError("CUDA error: misaligned address")))
    monkeypatch.setattr(smoke, "items", lambda device, only_runs: [Item(x, dict) for x in "abcdef"])
    monkeypatch.setattr(smoke, "row_items", list)
    monkeypatch.setattr("os.execv", lambda program, command: begun.append(command))
    smoke.main([str(tmp_path), *share, "--from=1"])
    assert begun[0][1:] == ["-m", "bench.gpu.smoke", str(tmp_path), *share, "--from=2"]
    (lines,) = tmp_path.glob("*.jsonl")
    assert read(lines)[0]["item"] == ("d" if share else "b")


def test_the_smoke_has_two_shapes_of_every_op_and_sees_a_wrong_one(tmp_path: Path) -> None:
    todo = smoke.items("cpu", only_runs=True)
    assert len(todo) == 2 * len(specs())
    assert todo[0].name.startswith("contrastive_loss ") and todo[2].name.startswith("sigmoid_loss ")
    chosen = [spec for spec in specs() if spec.name in ("distillation_loss", "ema_update_")]
    wrong = specs_with(chosen[0], lambda *args, **options: 1.5 * chosen[0].ref(*args, **options))
    found = [item for item in smoke.items("cpu", only_runs=False, chosen=[wrong, *chosen]) if "65536" not in item.name]
    run_items(found, tmp_path / "smoke.jsonl")
    errors = {line["item"]: line["error"] for line in read(tmp_path / "smoke.jsonl")}
    assert [bool(error) for error in errors.values()].count(True) == 1
    assert "AssertionError: wrong B3-C201" in str(errors["wrong B3-C201"].replace("{'B': 3, 'C': 201}", "B3-C201"))


def specs_with(spec: Any, op: Any) -> Any:
    return type(spec)(**{**vars(spec), "name": "wrong", "op": op})


def test_candidates_are_other_launches_and_each_table_is_found() -> None:
    config = Launch(128, 128, 64, 8, 3)
    found = candidates(config)
    assert 4 <= len(found) <= 6 and config not in found and len(set(found)) == len(found)
    for flagship in FLAGSHIPS:
        tried = list(rows_of(flagship, 90))
        assert bool(tried) == bool(flagship.rows), f"{flagship.name}: no row of the table is tried"
        assert not flagship.op or table_of(flagship.op)


def test_rows_are_timed_written_and_proposed_where_they_are_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of("contrastive")
    assert table is not None
    key = next(key for key in table if key[0].startswith("bwd") and key[1:] == (2, 90))
    before, calls = table[key], []
    best = candidates(before)[1]

    def fake(call: Any, device: torch.device) -> dict[str, Any]:
        calls.append(table[key])
        if table[key] == candidates(before)[0]:
            raise RuntimeError("out of resource: shared memory")
        return {"device_s": 0.9 if table[key] == best else 1.0, "host_s": 0.1, "by": "clock"}

    monkeypatch.setattr(times, "measured", fake)
    made = Flagship(FLAGSHIPS[0].name, lambda device: lambda: (torch.ones(3),), "contrastive", (key[0],))
    assert run_items(times.items(tmp_path, CPU, 90, (made,)), tmp_path / "times.jsonl", times.shown) is None
    assert table[key] == before and len(calls) == 2 + len(candidates(before))
    lines = read(tmp_path / "times.jsonl")
    refused = next(line for line in lines if "config" in line)
    assert refused["error"] == "RuntimeError: out of resource: shared memory"
    proposed = (tmp_path / "launch.patch").read_text()
    added = [line for line in proposed.splitlines() if line.startswith("+ ")]
    assert len(added) == 1 and f'("{key[0]}", 2, 90): Launch({best.block_m}, {best.block_n}' in added[0]
    assert proposed.startswith("--- a/kernels/mmkernels/contrastive/")
    # what gives other numbers is no candidate, nor what is as fast
    assert patch([{**line, "error": "gives other numbers"} for line in lines if "config" in line]) == ""


@pytest.mark.parametrize(("make", "sizes"), [
    (times._contrastive, (33, 16)), (times._sigmoid, (33, 16)), (times._linear_cross_entropy, (33, 16, 70)),
    (times._tokens, (5,)), (times._distill, (3, 70)), (times._attention, ("Q-Former ITG",)),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_a_small_flagship_runs_on_a_cpu_and_is_timed_by_its_clock(make: Any, sizes: tuple[Any, ...]) -> None:
    call = make(*sizes, CPU)
    assert all(x.isfinite().all() for x in times._tensors(call()))
    found = times.measured(call, CPU)
    assert found["by"] == "clock" and found["device_s"] > 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_probe_of_l2_reads_past_its_processors_cache() -> None:
    case = Case("l2", facts._l2_kernel, "l2", {}, {"BLOCK": facts.BLOCK}, {"x": "*fp32"})
    ptx = compile_kernel(case, "fp32", 90, Launch(16, 16, 16, 8, 1)).asm["ptx"]
    assert "ld.global.cg.v4" in ptx or re.search(r"ld\.global\.cg[\w.]*v4", ptx)


def test_products_of_a_gpu_are_timed_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes a tenth of a millisecond a call, and asks to be waited for once a batch."""
    waits = []
    monkeypatch.setattr("bench.measure.synchronize", waits.append)
    monkeypatch.setattr("bench.measure.torch.randn", lambda *size, **_: torch.zeros(size))
    monkeypatch.setattr("bench.measure.torch.mm", lambda a, b: time.sleep(1e-4))
    rate = gemm_flops_per_s.__wrapped__(64, 64, 64, torch.float32, torch.device("cuda"))
    # two ways, each in nine rounds and one that finds how many calls a round has
    assert len(waits) == 2 * 2 * 10 and 0 < rate < 2 * 64**3 / 1e-4


def test_the_facts_are_written_with_each_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory, L2_cache_size, multi_processor_count = "H200", 9, 0, 1, 2, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(facts, "clock_hz", lambda: 1e9)
    monkeypatch.setattr(
        facts, "rates", lambda device: {"l2_bytes_per_s": lambda: 132 * 34e9, "cut": raising(OSError())}
    )
    with pytest.raises(OSError):
        facts.main(tmp_path)
    assert json.loads((tmp_path / "facts.txt").read_text())["l2_bytes_per_s"] == 132 * 34e9
    monkeypatch.setattr(facts, "rates", lambda device: {"l2_bytes_per_s": lambda: 132 * 34e9})
    facts.main(tmp_path)
    assert json.loads((tmp_path / "facts.txt").read_text())["l2_bytes_per_clock_of_a_processor"] == 34


def test_lines_of_several_processes_share_a_file(tmp_path: Path) -> None:
    for i in range(3):
        append(tmp_path / "x.jsonl", i=i)
    assert [line["i"] for line in read(tmp_path / "x.jsonl")] == [0, 1, 2]
