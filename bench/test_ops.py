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
    found = {name: module for name, module in found.items() if not chosen or name in chosen}
    if "bench" in metafunc.fixturenames:
        cases = [case for module in found.values() for bench in module.BENCHES for case in bench.params()]
        metafunc.parametrize(("bench", "axes"), cases)
    else:
        claims = [
            pytest.param(check, id=f"{name}: {claim}")
            for name, module in found.items()
            for claim, check in getattr(module, "CLAIMS", {}).items()
        ]
        metafunc.parametrize("check", claims)


def test_op(benchmark: Any, device: torch.device, bench: Bench, axes: dict[str, Any]) -> None:
    contender = axes["contender"]
    if contender in bench.peers and (reason := missing(contender)):
        pytest.skip(f"{contender} {reason}")
    benchmark.params = axes
    time_case(benchmark, device, bench.case(**axes))


@pytest.mark.skipif(ON_GPU, reason="a claim about CPUs")
def test_claim(check: Callable[[], None]) -> None:
    check()
