"""The sigmoid loss's step on a tile, by ATen and by native code: no further from float64 than eager."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._tile import sigmoid_tile
from tests.kernels.tile_cases import EPS, SHAPES, Vectors, assert_bound, draw, framed, labels


def sigmoid_losses(cosines: Tensor, scale: float, bias: float, of: tuple[Tensor, Tensor]) -> Vectors:
    """Losses and their gradient as eager writes them, in the dtype of `cosines`."""
    z = torch.where(of[0][:, None] == of[1], 1.0, -1.0).to(cosines.dtype)
    x = scale * cosines + bias
    return -F.logsigmoid(z * x), -z * torch.sigmoid(-z * x)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (117.0, -12.9), (-3.0, 0.5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid_losses_are_as_exact_as_eagers(path, shape, scale: float, bias: float) -> None:
    cosines, of = draw("random", *shape), labels(*shape)
    (tile, _), (out, buffer) = framed(cosines), framed(torch.zeros(shape))
    row_loss = torch.full((shape[0],), 0.5)
    totals = sigmoid_tile(tile, scale, bias, *of, row_loss, out)
    refs = sigmoid_losses(cosines, scale, bias, of)
    losses, grads = sigmoid_losses(cosines.double(), scale, bias, of)
    assert_bound(row_loss, 0.5 + refs[0].sum(1), 0.5 + losses.sum(1))
    assert_bound(out, refs[1], grads)
    assert buffer.isnan().sum() == buffer.numel() - out.numel()
    # an entry's own error: the functions', and the rounding of x, which they amplify
    for total, terms in zip(totals, (losses, grads, grads * cosines.double()), strict=True):
        bound = (6 + 2 * (abs(scale) + abs(bias))) * EPS * terms.abs().sum()
        assert abs(total - terms.sum()) <= bound
    alone = torch.full((shape[0],), 0.5)
    assert torch.equal(sigmoid_tile(tile, scale, bias, *of, alone, None), totals * torch.tensor([1, 0, 0]))
    assert torch.equal(alone, row_loss)


def test_small_sigmoid_losses_keep_their_relative_precision(path) -> None:
    """Of 1e-9, a hundredth of epsilon: log(1 + e^y) would make zero of it, or an epsilon."""
    x = torch.linspace(-40, 40, 1999)[None]
    row_losses = torch.zeros(1999)
    out = torch.empty(1999, 1)
    sigmoid_tile(x.T.contiguous(), 1.0, 0.0, torch.zeros(1999).long(), torch.ones(1).long(), row_losses, out)
    torch.testing.assert_close(row_losses.double(), F.softplus(x[0].double(), threshold=99), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(out[:, 0].double(), x[0].double().sigmoid(), rtol=4 * EPS, atol=0)


def test_sigmoid_losses_of_extreme_logits_are_their_limits(path) -> None:
    cosines = torch.tensor([[math.inf, -math.inf, 3e38, -3e38, math.nan, 0.0]])
    for equal, losses, grads in (
        (1, [0, math.inf, 0, math.inf, math.nan, math.log(2)], [0, -1, 0, -1, math.nan, -0.5]),
        (0, [math.inf, 0, math.inf, 0, math.nan, math.log(2)], [1, 0, 1, 0, math.nan, 0.5]),
    ):
        row_loss, out = torch.zeros(6), torch.empty(6, 1)
        of = torch.zeros(6).long(), torch.tensor([1 - equal])
        sigmoid_tile(cosines.T.contiguous(), 2.0, 0.0, *of, row_loss, out)
        torch.testing.assert_close(row_loss, torch.tensor(losses).float(), equal_nan=True)
        torch.testing.assert_close(out[:, 0], torch.tensor(grads).float(), equal_nan=True)


def test_sigmoid_gradients_in_place_or_rounded_are_those_beside(path) -> None:
    cosines, of = draw("random", 50, 70), labels(50, 70)
    out, low = torch.empty_like(cosines), torch.empty(50, 70, dtype=torch.bfloat16)
    totals = [sigmoid_tile(cosines, 9.0, -3.0, *of, torch.zeros(50), into) for into in (out, low, cosines)]
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])
    assert torch.equal(cosines, out) and torch.equal(low, out.bfloat16())
