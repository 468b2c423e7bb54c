"""One timed case: a contender's call in a mode, its times, memory, error and prediction, into the benchmark's JSON."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.errors import TritonError

from bench.measure import peak_extra_bytes, predicted_s, synchronize
from bench.peers import PEERS
from mmkernels._cost import Cost

MODES = ("forward", "backward", "both")
# Seconds of a case's rounds: at most BUDGET_S, and less in a run of many cases, whose rounds all together take half of
# SESSION_S (what each takes besides, to begin, for its memory and its error, is more than that).
BUDGET_S = {"cpu": 1.5, "cuda": 0.3}
SESSION_S = {"cpu": 180.0, "cuda": 300.0}
WARM_UP_S = 0.1
# of a call whose memory is measured once, and that is warm after one
LONG_S = 0.25
# of bare products; a forward or a backward of more is timed with the other alone, on a CPU
APART_S = 0.03
# of bare products of an op, on a CPU: a case of more is left out, so that a slow one's run takes minutes too
MOST_S = 1.0
# of bare products, on a CPU; of more the error is not computed: float64 would take longer than all the rounds
EXACT_S = 0.2


# Cases that the device's memory did not hold, by group and contender, with their parameters: the JSON has them beside
# the timed ones.
OUT_OF_MEMORY: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        group: the table's line of cases that compare: op, dtype and shape.
        contender: by name; "mmkernels" is ours.
        loss: the call, from no arguments to a scalar with a gradient.
        wrt: the leaves whose gradients "backward" and "both" compute.
        mode: "forward" (no graph), "backward" (of one graph, again and again), "both", "update" of an op that has
            no gradients, or "step", a call that makes its gradients itself.
        floor_s: seconds that the bare matrix products of ours take on this machine, or the copying of its bytes.
        cost: what ours asks of the machine, for the cost model; None for others.
        gemm_rate: FLOP/s of those bare products.
        error: largest relative error of a gradient against float64, computed on demand.
    """

    group: str
    contender: str
    loss: Callable[[], Any]
    wrt: tuple[Tensor, ...]
    mode: str
    floor_s: float
    cost: Cost | None = None
    gemm_rate: float = 0.0
    error: Callable[[], float] | None = None


def share_time(num_cases: int) -> None:
    """Sets the seconds of a case, of as many in this run."""
    for device, most in SESSION_S.items():
        BUDGET_S[device] = min(BUDGET_S[device], most / 2 / max(num_cases, 1))


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def step(case: Case) -> Callable[[], object]:
    """The timed call; "backward" reuses one graph."""
    if case.mode == "step":
        return case.loss
    if case.mode in ("forward", "update"):
        return torch.no_grad()(case.loss)
    if case.mode == "both":
        return lambda: torch.autograd.grad(case.loss(), case.wrt)
    value = case.loss()
    return lambda: torch.autograd.grad(value, case.wrt, retain_graph=True)


def refusal(call: Callable[[], object]) -> str | None:
    """What a peer says where it does not serve a case, in a line; None where it does."""
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError, TritonError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def time_case(benchmark: Any, device: torch.device, case: Case) -> None:
    """Times the case; skips, and says so, what does not fit into memory and what a peer does not serve."""
    benchmark.group = f"{case.group} {case.mode}"
    if device.type == "cpu" and case.mode in MODES and case.floor_s > MOST_S:
        pytest.skip(f"bare products alone would take more than {MOST_S:g} s here")
    if device.type == "cpu" and case.mode in ("forward", "backward"):
        if case.floor_s > APART_S:
            pytest.skip("large cases of a CPU are timed forward and backward together")
        if case.contender == "compile":
            pytest.skip("compiled forward and backward together on a CPU: each compilation takes seconds")
    try:
        if case.contender in PEERS and (reason := refusal(lambda: step(case)())):
            pytest.skip(f"{case.contender} does not serve this: {reason}")
        _time(benchmark, device, case)
    except torch.OutOfMemoryError:
        OUT_OF_MEMORY.append(
            {
                "group": benchmark.group,
                "extra_info": {"contender": case.contender},
                "params": {name: x for name, x in (benchmark.params or {}).items() if name == "shape"},
            }
        )
        pytest.skip(f"{case.contender} needs more memory than the device has")


def _time(benchmark: Any, device: torch.device, case: Case) -> None:
    """Times the case, and writes what the tables show into the benchmark's `extra_info`."""
    call = step(case)

    def timed() -> None:
        call()
        synchronize(device)

    # the first calls of a process find the allocator cold
    began, calls, seconds = time.perf_counter(), 0, 0.0
    while calls < (1 if seconds > LONG_S else 2) or time.perf_counter() - began < WARM_UP_S:
        call_began = time.perf_counter()
        timed()
        seconds, calls = time.perf_counter() - call_began, calls + 1
    rounds = max(3 if seconds > LONG_S else 5, min(50, int(BUDGET_S[device.type] / (seconds + 1e-6))))
    benchmark.pedantic(timed, rounds=rounds, iterations=1)
    if not benchmark.enabled:
        return
    times = torch.tensor(benchmark.stats.stats.data)
    info: dict[str, Any] = {
        "contender": case.contender,
        "p20_s": float(times.quantile(0.2)),
        "p80_s": float(times.quantile(0.8)),
        "roofline_share": case.floor_s / float(times.median()),
    }
    if case.cost is not None:
        info["predicted_s"] = predicted_s(case.cost, case.gemm_rate, device)
    if case.mode in ("both", "update", "step"):
        gradients = sum(x.numel() * x.element_size() for x in case.wrt)
        extra = peak_extra_bytes(timed, device, runs=1 if seconds > LONG_S else 3)
        info["extra_bytes"] = None if extra is None else max(0, extra - gradients)
        is_large = device.type == "cpu" and case.floor_s > EXACT_S
        info["error_da"] = None if case.error is None or is_large else case.error()
    benchmark.extra_info.update(info)
