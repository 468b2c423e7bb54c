"""The whole loss on one stored tile, by ATen and by native code."""

import pytest
import torch
from torch import Tensor

from mmkernels._tile import info_nce_tile
from tests.kernels.tile_cases import assert_bound, draw, framed

CASES = ["random", "negative", "far apart"]


def eager(cosines: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in the cosines and in scale as the field writes them, in their dtype."""
    factor = torch.tensor(scale, dtype=cosines.dtype, requires_grad=True)
    cosines = cosines.detach().requires_grad_()
    logits = cosines * factor
    targets = torch.arange(len(cosines))
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    dcosines, dfactor = torch.autograd.grad(loss, (cosines, factor))
    return loss.detach(), dcosines, dfactor


@pytest.mark.parametrize("scale", [1.0, 100.0, -7.0, 0.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 7, 33, 150])
def test_loss_and_gradient_are_as_exact_as_eagers(path, size: int, case: str, scale: float) -> None:
    cosines = draw(case, size, size)
    tile, buffer = framed(cosines)
    loss, dscale = info_nce_tile(tile, scale, cosines.mean())
    refs, golds = eager(cosines, scale), eager(cosines.double(), scale)
    for got, ref, gold in zip((loss, tile, dscale), refs, golds, strict=True):
        assert_bound(got, ref, gold)
    assert buffer.isnan().sum() == buffer.numel() - tile.numel()


def test_in_a_cone_the_scales_gradient_does_not_cancel(path) -> None:
    cosines = 0.9 + 1e-4 * draw("random", 150, 150)
    gold = eager(cosines.double(), 14.0)[2]
    assert (info_nce_tile(cosines, 14.0, cosines.mean())[1] - gold).abs() < 1e-4 * gold.abs()


def test_without_a_center_the_loss_comes_alone(path) -> None:
    cosines = draw("random", 33, 33)
    with_gradient = info_nce_tile(cosines.clone(), 9.0, 0.0)
    alone = info_nce_tile(cosines, 9.0, None)
    assert alone[0] == with_gradient[0] and alone[1] == 0


@pytest.mark.parametrize("at", [(0, 0), (3, 20), (32, 32)])
def test_one_nan_is_the_losss(path, at: tuple[int, int]) -> None:
    cosines = draw("random", 33, 33)
    cosines[at] = torch.nan
    assert info_nce_tile(cosines, 9.0, 0.0).isnan().all()
    assert cosines[at].isnan()
