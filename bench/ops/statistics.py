"""`mmkernels.contrastive_stats`, `contrastive_lse` and `token_contrastive_stats`, which losses are made of: entries in
the contract test, and benchmarks beside the same with whole matrices, eager and compiled."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.case import Case, dtype_id
from bench.contract import cast_inputs
from bench.harness import DEVICE, DTYPE, ON_GPU, Bench, gradient_case
from bench.measure import assert_agrees, gemm_flops_per_s
from bench.ops import token_contrastive as tokens
from bench.ops.contrastive import CASES, cost_of, make_pair, rectangle, teacher_of
from bench.spec import Inputs, OpSpec, Shape, shape_id
from mmkernels import contrastive_lse, contrastive_lse_ref, contrastive_stats, contrastive_stats_ref


def _make_stats_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """The positives a rank's: on a diagonal that begins at the offset; the teacher's features noisy copies."""
    inputs = make_pair(shape, case, dtype, seed)
    positives = torch.arange(shape["M"]) + shape["offset"]
    return {**inputs, "positives": positives, "teacher": teacher_of(inputs, seed)}


def _draw_stats_shape(draw: Callable[[int, int], int]) -> Shape:
    shape = rectangle(draw)
    return {**shape, "offset": draw(0, shape["N"] - shape["M"])}


STATS = OpSpec(
    name="contrastive_stats",
    op=lambda *args, **kwargs: contrastive_stats(*args, **kwargs)[:5],
    ref=contrastive_stats_ref,
    make_inputs=_make_stats_inputs,
    shapes=(
        {"M": 1, "N": 1, "D": 1, "offset": 0},
        {"M": 7, "N": 70, "D": 3, "offset": 63},
        {"M": 33, "N": 65, "D": 33, "offset": 17},
    ),
    draw_shape=_draw_stats_shape,
    cases=CASES,
    differentiable=("a", "b", "logit_scale"),
)


def _exclude_stats_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Every third row does not see the column behind its positive; every fourth has no positive."""
    made, cols = _make_stats_inputs(shape, case, dtype, seed), shape["N"]
    exclude = torch.where(torch.arange(shape["M"]) % 3 == 1, (made["positives"] + 1) % cols, -1)
    made["positives"][2::4] = -1
    return made | {"exclude": exclude}


EXCLUDE = replace(
    STATS,
    name="contrastive_stats[exclude]",
    make_inputs=_exclude_stats_inputs,
    shapes=STATS.shapes[1:],
    cases=("random", "cone"),
)

LSE = OpSpec(
    name="contrastive_lse",
    op=contrastive_lse,
    ref=contrastive_lse_ref,
    make_inputs=make_pair,
    shapes=({"M": 1, "N": 1, "D": 1}, {"M": 7, "N": 70, "D": 3}, {"M": 33, "N": 65, "D": 33}),
    draw_shape=rectangle,
    cases=("random", "trained"),
    differentiable=("a", "b", "logit_scale"),
)

SPECS = (STATS, EXCLUDE, LSE)

# a CPU's forward is in its forward and backward, and a compilation takes up to half a minute
MODES = ("forward", "both") if ON_GPU else ("both",)
COMPILED = ("contrastive_stats", "contrastive_lse") if ON_GPU else ("contrastive_lse",)
TIMED = {spec.name: spec for spec in (STATS, LSE, tokens.STATS)}
# a rank's rows, the second's, against the gathered batch
RANKS: Shape = (
    {"M": 8192, "N": 65536, "D": 768, "offset": 8192} if ON_GPU else {"M": 512, "N": 4096, "D": 512, "offset": 512}
)
SHAPES = {
    "contrastive_stats": RANKS,
    "contrastive_lse": RANKS,
    "token_contrastive_stats": {"M": 128 if ON_GPU else 64, "Q": 32, "N": 1024, "D": 256},
}
CONTENDERS = {
    "mmkernels": lambda spec: spec.op,
    "eager": lambda spec: spec.ref,
    "compile": lambda spec: torch.compile(spec.ref, dynamic=False),
}


@cache
def _inputs(name: str, dtype: torch.dtype) -> Inputs:
    """Leaves of the one shape that the op is timed at; a teacher is timed with the loss."""
    spec = TIMED[name]
    made = spec.make_inputs(SHAPES[name], "trained", DTYPE, 0)
    made.pop("teacher", None)
    made = cast_inputs(made, None if dtype == DTYPE else dtype, DEVICE.type)
    return made | {x: made[x].requires_grad_() for x in spec.differentiable}


def _total(call: Any, given: Inputs) -> Tensor:
    """A loss through which every statistic has a gradient."""
    return sum((x.sum() for x in call(**given)), start=torch.zeros((), device=DEVICE))


def _gradient(call: Any, given: Inputs) -> Tensor:
    """Of the rows' features, the first argument."""
    return torch.autograd.grad(_total(call, given), next(iter(given.values())))[0]


@cache
def _gold(name: str) -> Tensor:
    """In float64 of the same inputs."""
    return _gradient(TIMED[name].ref, _inputs(name, torch.float64))


def _case(op: str, contender: str, mode: str) -> Case:
    if contender == "compile" and op not in COMPILED:
        pytest.skip(f"compiled for {', '.join(COMPILED)} only: each compilation takes up to half a minute")
    shape, given, call = SHAPES[op], _inputs(op, DTYPE), CONTENDERS[contender](TIMED[op])
    wrt = tuple(given[x] for x in TIMED[op].differentiable)
    assert_agrees(_gradient(call, _inputs(op, torch.float32)), _gold(op))
    forward, backward = tokens.cost_of(shape, wrt[0]) if "Q" in shape else cost_of(wrt[0], shape["N"])
    num_products = shape["M"] * shape.get("Q", 1)
    return gradient_case(
        f"{op} {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: _total(call, given),
        wrt,
        mode,
        forward if mode == "forward" else forward + backward,
        rate=gemm_flops_per_s(num_products, shape["N"], shape["D"], DTYPE, DEVICE),
        gold=lambda: _gold(op),
    )


BENCHES = tuple(Bench(op, partial(_case, op), {"contender": tuple(CONTENDERS), "mode": MODES}) for op in TIMED)
