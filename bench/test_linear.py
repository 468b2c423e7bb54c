"""A linear layer's step: forward and its gradients, at the shapes of a Q-Former's and a ViT's blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bench.case import Case, time_case
from bench.measure import gemm_flops_per_s, paired_medians
from mmcore.nn import Linear

SHAPES = ((1536, 768, 3072), (4352, 128, 512))  # rows, inputs, outputs
LAYERS: dict[str, type[nn.Linear]] = {"mmcore": Linear, "torch.nn.Linear": nn.Linear}


def call(
    contender: str, shape: tuple[int, int, int], device: torch.device
) -> tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]:
    rows, width, out = shape
    torch.manual_seed(0)
    layer = LAYERS[contender](width, out).to(device)
    x, dy = torch.randn(rows, width, device=device, requires_grad=True), torch.randn(rows, out, device=device)
    return lambda: (layer(x) * dy).sum(), (x, *layer.parameters())


@pytest.mark.parametrize("contender", LAYERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(benchmark: Any, device: torch.device, shape: tuple[int, int, int], contender: str) -> None:
    loss, wrt = call(contender, shape, device)
    rate = gemm_flops_per_s(*shape, torch.float32, device)
    flops = 6 * shape[0] * shape[1] * shape[2]
    group = "linear float32 " + "x".join(map(str, shape))
    time_case(benchmark, device, Case(group, contender, loss, wrt, "both", flops / rate))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_not_behind_torchs(device: torch.device, shape: tuple[int, int, int]) -> None:
    runs = {}
    for name in LAYERS:
        loss, wrt = call(name, shape, device)
        runs[name] = lambda loss=loss, wrt=wrt: torch.autograd.grad(loss(), wrt)
    medians = paired_medians(runs, 15, device)
    ratio = medians["torch.nn.Linear"] / medians["mmcore"]
    print(f"linear {shape}: {ratio:.2f}x")
    assert ratio >= 0.95
