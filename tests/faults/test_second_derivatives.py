"""create_graph=True: the right second derivative, or an error; never a term that is missing in silence."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmcore.losses import contrastive, sigmoid, token
from mmcore.losses.drop_in import ClipLoss, SigLipLoss
from mmcore.nn import linear
from mmkernels.pieces import first_order
from tests.kernels.derivatives import MODES, holds, table

SCALE, BIAS = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)


def rows(count: int, width: int = 16) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def penalty(loss: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """The gradient of loss + 10 |its gradient|^2."""
    a = a.clone().requires_grad_()
    value = loss(a)
    [first] = torch.autograd.grad(value, a, create_graph=True)
    return torch.autograd.grad(value + 10 * first.square().sum(), a)[0]


attention_ref: Any = mmkernels.attention_ref  # a tuple where the log-sum-exps are asked for
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "contrastive": (
        lambda a, b: mmkernels.contrastive_loss(a, b, SCALE), lambda a, b: mmkernels.contrastive_loss_ref(a, b, SCALE)
    ),
    "sigmoid": (
        lambda a, b: mmkernels.sigmoid_loss(a, b, SCALE, BIAS),
        lambda a, b: mmkernels.sigmoid_loss_ref(a, b, SCALE, BIAS),
    ),
    "distillation": (
        lambda a, b: mmkernels.distillation_loss(a, b, 0.1, 0.04),
        lambda a, b: mmkernels.distillation_loss_ref(a, b, 0.1, 0.04),
    ),
    "linear_cross_entropy": (
        lambda a, b: mmkernels.linear_cross_entropy(a, b, torch.arange(len(a)) % len(b)),
        lambda a, b: mmkernels.linear_cross_entropy_ref(a, b, torch.arange(len(a)) % len(b)),
    ),
    "stats": (
        lambda a, b: mmkernels.contrastive_stats(a, b, SCALE).row_lse.sum(),
        lambda a, b: torch.logsumexp(SCALE * a @ b.T, 1).sum(),
    ),
    "attention": (
        lambda a, b: mmkernels.attention(*(x.view(1, -1, 2, 8) for x in (a, b, b))).square().sum(),
        lambda a, b: torch.square(attention_ref(*(x.view(1, -1, 2, 8) for x in (a, b, b)))).sum(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("count", [8, 40, 200, 400])
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_a_gradient_is_right_or_refused(op: str, count: int) -> None:
    a, b = F.normalize(rows(count), dim=-1), F.normalize(rows(count + 1)[:count], dim=-1)
    ours, theirs = ((lambda a, call=call: call(a, b)) for call in OPS[op])
    try:
        found = penalty(ours, a)
    except RuntimeError as error:
        assert re.search("create_graph must be False|derivative for .* is not implemented", str(error))
        return
    torch.testing.assert_close(found, penalty(theirs, a), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [8, 40, 200])
def test_the_plain_contrastive_loss_has_second_derivatives_on_a_cpu(count: int) -> None:
    a, b = rows(count), rows(count + 1)[:count]
    ours, theirs = ((lambda a, call=call: call(a, b)) for call in OPS["contrastive"])
    torch.testing.assert_close(penalty(ours, a), penalty(theirs, a), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_layers_product_has_every_derivative(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_PRODUCT", 0)
    layer = linear.Linear(16, 16)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = (lambda x: layer(x).tanh().sum()), (lambda x: F.linear(x, layer.weight, layer.bias).tanh().sum())
    holds(table()["`mmcore.nn.Linear`"][mode], mode, ours, theirs, x)


@pytest.mark.parametrize("mode", MODES)
def test_the_drop_in_losses_have_every_derivative_of_few_rows(mode: str) -> None:
    b = rows(9)[:8]
    pairs = {
        ClipLoss(): lambda x: mmkernels.contrastive_loss_ref(x, b, SCALE),
        SigLipLoss(): lambda x: mmkernels.sigmoid_loss_ref(x, b, SCALE, BIAS),
    }
    for loss, published in pairs.items():
        holds("right", mode, lambda x, loss=loss: loss(x, b, SCALE, BIAS), published, rows(8))


def test_a_backward_without_a_derivative_refuses_to_be_a_graph() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        @first_order("square", "x ** 2")
        def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return 2 * upstream * ctx.saved_tensors[0]

    x = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(Square.apply(x), x)[0].tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match=r"square: create_graph must be False, .* take x \*\* 2 for second"):
        torch.autograd.grad(Square.apply(x), x, create_graph=True)


@pytest.mark.parametrize("of_ranks", [contrastive._GlobalStats, sigmoid._SigmoidSum, token._TokenStats])
def test_losses_over_ranks_refuse_to_be_a_graph(of_ranks: Any) -> None:
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        of_ranks.backward(None, torch.ones(()))
