"""`mmcore.losses.global_contrastive_loss` on two ranks of a CPU, forward and backward with what is sent, beside
open_clip's ways with torch's differentiable collectives.

`bench/scale.py` has many ranks, simulated. The roofline is a rank's share of three bare products: logits as
few as these are kept.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.case import Case, time_case
from bench.measure import assert_agrees, gemm_flops_per_s, relative_error
from bench.ops.contrastive import cost_of
from bench.two_ranks import CONTENDERS, NUM_RANKS, ROWS, WIDTH, first_rank, leaves, two_ranks, whole_batch
from mmkernels import contrastive_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    with two_ranks():
        yield


@functools.cache
def gold() -> torch.Tensor:
    """da of the first rank's rows in float64; data parallelism takes the mean over ranks."""
    a, b, scale = (x.detach().double().requires_grad_() for x in whole_batch())
    return torch.autograd.grad(contrastive_loss(a, b, scale), a)[0][:ROWS] * NUM_RANKS


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo's ranks are a CPU's, and NCCL's want a GPU each")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_global_contrastive_loss(benchmark: Any, ranks: None, contender: str) -> None:
    mine = leaves()
    da = torch.autograd.grad(first_rank(contender, mine), mine)[0]
    assert_agrees(da, gold())
    forward, backward = cost_of(mine[0], NUM_RANKS * ROWS)
    case = Case(
        group=f"global_contrastive_loss float32 W{NUM_RANKS}-B{ROWS}-D{WIDTH}",
        contender=contender,
        loss=lambda: first_rank(contender, mine),
        wrt=mine,
        mode="both",
        floor_s=(forward + backward).flops / gemm_flops_per_s(ROWS, ROWS, WIDTH, torch.float32, CPU),
        error=lambda: relative_error(da, gold()),
    )
    time_case(benchmark, CPU, case)
