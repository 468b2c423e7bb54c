"""A step of BLIP-2's second stage at the Q-Former's real shapes, from pixels to all gradients, beside transformers'."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.blip2_lm import CONTENDERS, CPU, GPU, LENGTH, batch, our_step, ours, step_flops, theirs
from bench.case import Case, time_case
from bench.measure import assert_agrees, gemm_flops_per_s
from mmcore.data.text.prompts import Prompted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = GPU if DEVICE.type == "cuda" else CPU


@functools.cache
def model(attention: str | None, dropout: float) -> Any:
    """Ours, or transformers' with its weights."""
    if attention is None:
        return ours(SHAPE, dropout, DEVICE)
    return theirs(model(None, dropout), attention)


@functools.cache
def inputs() -> tuple[Tensor, Prompted]:
    return batch(SHAPE, DEVICE)


def step(contender: str, dropout: float) -> Callable[[], Tensor]:
    attention, run = CONTENDERS[contender]
    return functools.partial(run, model(attention, dropout), *inputs())


@functools.cache
def gold() -> tuple[float, Tensor]:
    """The loss, and the gradient of the projection, by ours in float64, which tests hold to transformers'."""
    wide, (images, texts) = copy.deepcopy(model(None, 0.0)).double(), inputs()
    loss = our_step(wide, images.double(), texts)
    return loss.item(), wide.language_projection.weight.grad


@pytest.mark.parametrize("contender", CONTENDERS)
def test_blip2_stage2(benchmark: Any, device: torch.device, contender: str) -> None:
    rate = gemm_flops_per_s(2048, 768, 768, torch.float32, device)
    case = Case(
        group=f"blip2-stage2 B{SHAPE.size}-Q32-T{LENGTH}-P257-V{SHAPE.opt.vocab_size}",
        contender=contender,
        loss=step(contender, 0.1),
        wrt=(),
        mode="step",
        floor_s=step_flops(model(None, 0.1), inputs()[1]) / rate,
    )
    time_case(benchmark, device, case)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_all_compute_the_same_loss_and_gradient(contender: str) -> None:
    """As float64 does, without dropout."""
    loss = step(contender, 0.0)().item()
    expected, gradient = gold()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_agrees(model(CONTENDERS[contender][0], 0.0).language_projection.weight.grad, gradient)
