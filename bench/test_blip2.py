"""A step of BLIP-2's first stage at the Q-Former's real shapes, from the states of a frozen tower to all gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.blip2 import CONTENDERS, batch, model
from bench.case import Case, time_case
from bench.measure import paired_medians

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a rank's batch, as published on a GPU
SIZE = 100 if DEVICE.type == "cuda" else 8


def step(contender: str, dropout: float) -> Callable[[], Tensor]:
    blip2, inputs = model(dropout, DEVICE), batch(SIZE, DEVICE)

    def run() -> Tensor:
        blip2.zero_grad()
        return CONTENDERS[contender](blip2, *inputs)

    return run


@pytest.mark.parametrize("contender", CONTENDERS)
def test_blip2_stage1(benchmark: Any, device: torch.device, contender: str) -> None:
    case = Case(
        group=f"blip2-stage1 step B{SIZE}-Q32-T32-P257",
        contender=contender,
        loss=step(contender, 0.1),
        wrt=(),
        mode="update",
        floor_s=0.0,
        cost=None,
        gemm_rate=1.0,
    )
    time_case(benchmark, device, case)


def test_both_compute_the_same_objectives() -> None:
    """But for the negatives, which each draws for itself."""
    losses = {name: step(name, 0.0)().item() for name in CONTENDERS}
    ours, theirs = losses.values()
    assert ours == pytest.approx(theirs, rel=0.01), losses


def test_a_step_is_ahead_of_the_eager_one() -> None:
    runs = {name: step(name, 0.1) for name in CONTENDERS}
    medians = paired_medians(runs, 5, DEVICE)
    ratio = medians["eager, as LAVIS"] / medians["mmcore"]
    print(f"blip2-stage1 step, {SIZE} pairs: {medians}: {ratio:.2f}x")
    assert ratio >= (1.5 if DEVICE.type == "cuda" else 1.3)
