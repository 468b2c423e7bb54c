"""`pytest bench/test_ops.py`: every op of `bench/ops` at real shapes, times, memory and errors beside other contenders,
and with `--claims` what is said of them; `--op NAME` takes those of one module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.case import time_case
from bench.harness import ON_GPU, Bench
from bench.ops import modules
from bench.peers import missing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found, chosen = modules(), metafunc.config.getoption("--op") or ()
    if unknown := [name for name in chosen if name not in found]:
        raise pytest.UsageError(f"--op must be a module of bench/ops, {', '.join(found)}, got {', '.join(unknown)}")
    found = {name: found[name] for name in chosen or found}
    if "bench" in metafunc.fixturenames:
        cases = chosen_cases([bench for module in found.values() for bench in module.BENCHES], metafunc.config)
        metafunc.parametrize(("bench", "axes"), cases)
    else:
        claims = [
            pytest.param(check, id=f"{name}: {claim}")
            for name, module in found.items()
            for claim, check in getattr(module, "CLAIMS", {}).items()
        ]
        metafunc.parametrize("check", claims)


def chosen_cases(benches: list[Bench], config: pytest.Config) -> list[Any]:
    """All of them, or as `--plain` and `--largest-first` have it."""
    of_benches = []
    for bench in benches:
        left_out = {"compile", "flex", *bench.peers} if config.getoption("--plain") else set()
        of_benches.append([case for case in bench.params() if case.values[1]["contender"] not in left_out])
    if not config.getoption("--largest-first"):
        return [case for cases in of_benches for case in cases]
    ranked = []
    for bench, cases in zip(benches, of_benches, strict=True):
        sizes = sorted({bench.size(case.values[1]) for case in cases}, reverse=True)
        ranked += [(sizes.index(bench.size(case.values[1])), case) for case in cases]
    # the largest of every op, then the next: sorting keeps the order within a rank
    return [case for _, case in sorted(ranked, key=lambda x: x[0])]


def test_op(benchmark: Any, device: torch.device, bench: Bench, axes: dict[str, Any]) -> None:
    contender = axes["contender"]
    if contender in bench.peers and (reason := missing(contender)):
        pytest.skip(f"{contender} {reason}")
    benchmark.params = axes
    time_case(benchmark, device, bench.case(**axes))


@pytest.mark.skipif(ON_GPU, reason="a claim about CPUs")
def test_claim(check: Callable[[], None]) -> None:
    check()
