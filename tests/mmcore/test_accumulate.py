"""Micro-batches, beyond what the trainer's tests hold of them."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.train.accumulate import plain_backward
from tests.kernels.fake_driver import FAKED, FakeGpu


def step(weights: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The gradient and the mean of the losses `3 w`, `6 w`, ... under these weights."""
    parameter = torch.ones((), requires_grad=True)
    model = SimpleNamespace(
        device=device, place=lambda x: x, accumulate=nullcontext, backward=lambda loss, last: loss.backward()
    )
    recipe = SimpleNamespace(loss=lambda _, part, __: {"loss": 3 * part * parameter}, weight=lambda i: weights[i - 1])
    losses = plain_backward(recipe, model, range(1, len(weights) + 1), None)
    assert parameter.grad is not None
    return parameter.grad, losses["loss"]


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_losses_of_micro_batches_count_by_their_weights(kind: Any) -> None:
    found = step([kind(1.0), kind(3.0)], torch.device("cpu"))
    assert [x.item() for x in found] == [5.25, 5.25]


@pytest.mark.skipif(not FAKED, reason="needs triton's driver, not its interpreter")
def test_weights_that_the_host_knows_go_to_a_gpu_without_a_wait() -> None:
    with FakeGpu() as gpu, gpu.record(device=0):
        step([1.0, 3.0], torch.device("cuda", 0))
