"""`mmkernels.contrastive_stats`, `contrastive_lse` and `token_contrastive_stats`, which losses are made of, beside the
same with whole matrices, eager and compiled."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.case import Case, dtype_id, time_case
from bench.contrastive import cost as cost_of
from bench.measure import assert_agrees, gemm_flops_per_s, relative_error
from bench.token_contrastive import cost as token_cost
from mmkernels._contract import cast_inputs
from mmkernels._spec import Inputs, OpSpec, shape_id
from mmkernels.contrastive.spec import LSE, STATS
from mmkernels.token_contrastive.spec import STATS as TOKEN_STATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# a CPU's forward is in its forward and backward, and a compilation takes up to half a minute
MODES = ("both",) if DEVICE == "cpu" else ("forward", "both")
COMPILED = ("contrastive_lse",) if DEVICE == "cpu" else ("contrastive_stats", "contrastive_lse")
SPECS = {spec.name: spec for spec in (STATS, LSE, TOKEN_STATS)}
CONTENDERS = {
    "mmkernels": lambda spec: spec.op,
    "eager": lambda spec: spec.ref,
    "compile": lambda spec: torch.compile(spec.ref, dynamic=False),
}


def gemm_rate(shape: tuple[int, int, int]) -> float:
    return gemm_flops_per_s(*shape, DTYPE, torch.device(DEVICE))


@functools.cache
def inputs(name: str, dtype: torch.dtype) -> Inputs:
    """Leaves of the one shape that the op is timed at; a teacher is timed with the loss."""
    spec = SPECS[name]
    made = spec.make_inputs(spec.bench_shapes[DEVICE][0], "trained", DTYPE, 0)
    made.pop("teacher", None)
    made = cast_inputs(made, None if dtype == DTYPE else dtype, DEVICE)
    return made | {x: made[x].requires_grad_() for x in spec.differentiable}


def total(call: Any, given: Inputs) -> Tensor:
    """A loss through which every statistic has a gradient."""
    return sum((x.sum() for x in call(**given)), start=torch.zeros((), device=DEVICE))


def gradient(call: Any, given: Inputs) -> Tensor:
    """Of the rows' features, the first argument."""
    return torch.autograd.grad(total(call, given), next(iter(given.values())))[0]


@functools.cache
def gold(name: str) -> Tensor:
    """In float64 of the same inputs."""
    return gradient(SPECS[name].ref, inputs(name, torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("op", SPECS)
def test_statistics(benchmark: Any, device: torch.device, op: str, contender: str, mode: str) -> None:
    spec: OpSpec = SPECS[op]
    if contender == "compile" and op not in COMPILED:
        pytest.skip(f"compiled for {', '.join(COMPILED)} only: each compilation takes up to half a minute")
    shape, given, call = spec.bench_shapes[DEVICE][0], inputs(op, DTYPE), CONTENDERS[contender](spec)
    wrt = tuple(given[x] for x in spec.differentiable)
    assert_agrees(gradient(call, inputs(op, torch.float32)), gold(op))
    forward, backward = token_cost(shape, wrt[0]) if "Q" in shape else cost_of(wrt[0], shape["N"])
    cost = forward if mode == "forward" else forward + backward
    rate = gemm_rate((shape["M"] * shape.get("Q", 1), shape["N"], shape["D"]))
    case = Case(
        group=f"{op} {dtype_id(DTYPE)} {shape_id(shape)}",
        contender=contender,
        loss=lambda: total(call, given),
        wrt=wrt,
        mode=mode,
        floor_s=cost.flops / rate,
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=rate,
        error=lambda: relative_error(gradient(call, given), gold(op)),
    )
    time_case(benchmark, device, case)
