"""What the sigmoid loss promises beyond the contract that every op obeys."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from bench.contract import cast_inputs, evaluate
from bench.ops.sigmoid import LABELS
from mmkernels import sigmoid_loss, sigmoid_loss_ref

EPS = torch.finfo(torch.float32).eps


def features(*sizes: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    return [(scale * torch.randn(size, 24)).to(dtype).requires_grad_() for size in sizes]


def test_the_loss_is_the_papers_pseudocode(either_form: None) -> None:
    """Algorithm 1 of arXiv:2303.15343, entry by entry in double precision."""
    a, b = features(5, 5)
    total = 0.0
    for i, j in itertools.product(range(5), range(5)):
        logit = 0.7 * math.fsum(x * y for x, y in zip(a[i].tolist(), b[j].tolist())) - 3.0
        sign = 1.0 if i == j else -1.0
        total -= math.log(1 / (1 + math.exp(-sign * logit)))
    ids = torch.arange(5) << 40
    for labels in (None, (ids, ids)):
        assert abs(sigmoid_loss(a, b, 0.7, -3.0, labels=labels).item() - total / 5) <= 8 * EPS * total / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients_of_each_row_with_labels_are_the_references(dtype: torch.dtype, either_form: None) -> None:
    inputs = LABELS.make_inputs({"M": 50, "N": 70, "D": 9}, "trained", dtype, 0) | {"reduction": "none"}
    got = evaluate(sigmoid_loss, inputs, LABELS.differentiable)
    gold = evaluate(sigmoid_loss_ref, cast_inputs(inputs, torch.float64), LABELS.differentiable)
    for name, value in got.items():
        error = (value - gold[name]).abs().max()
        assert error <= 32 * torch.finfo(dtype).eps * gold[name].abs().max(), name


def test_gradients_of_faint_negatives_survive_float16(streamed: None) -> None:
    """At bias -14 a negative's dL/dx is 8e-7, fourteen of float16's smallest steps, and the mean divides by B again:
    here the negatives are all of the gradient of `a`."""
    a, b = (x.detach().half().requires_grad_() for x in features(70, 70, scale=0.01))
    ids = torch.arange(70)
    loss = sigmoid_loss(a, b, 1.0, -14.0, labels=(ids, ids + 70))
    grad, *_ = torch.autograd.grad(2.0**18 * loss, a)
    wide = a.detach().double().requires_grad_()
    gold, *_ = torch.autograd.grad(
        2.0**18 * sigmoid_loss_ref(wide, b.double(), 1.0, -14.0, labels=(ids, ids + 70)), wide
    )
    assert (grad.double() - gold).abs().max() <= torch.finfo(torch.float16).eps * gold.abs().max()


def test_faint_losses_keep_their_relative_precision(either_form: None) -> None:
    """log(1 + t) in place of log1p(t) would err by a quarter here."""
    zeros, ids = torch.zeros(3, 4), torch.arange(3)
    loss = sigmoid_loss(zeros, zeros, 1.0, -15.0, labels=(ids, ids + 3), reduction="sum")
    gold = 9 * math.log1p(math.exp(-15))
    assert abs(loss.item() - gold) <= 8 * EPS * gold


def test_logits_of_a_thousand_have_exact_losses_and_gradients(either_form: None) -> None:
    a = torch.eye(40).requires_grad_()
    b = (-torch.eye(40)).requires_grad_()
    loss = sigmoid_loss(a, b, 1000.0, 0.0, reduction="none")
    # the positive's is -1000; each of the 39 negatives' is 0
    torch.testing.assert_close(loss, torch.full((40,), 1000 + 39 * math.log(2)), rtol=4 * EPS, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), a)
    torch.testing.assert_close(
        grad, torch.where(torch.eye(40) > 0, 1000.0, -500.0), rtol=4 * EPS, atol=0, msg=str(grad)
    )


def test_the_sum_over_many_tiles_does_not_drift(streamed: None) -> None:
    """625 tiles of one value: summed in float32, a tile after a tile, the total would lose more than this."""
    zeros, ids = torch.zeros(20_000, 1), torch.arange(20_000)
    loss = sigmoid_loss(zeros[:1], zeros, 1.0, -3.0, labels=(ids[:1] - 1, ids), reduction="sum")
    gold = 20_000 * math.log1p(math.exp(-3))
    assert abs(loss.item() - gold) <= 2 * EPS * gold


def test_the_scales_gradient_is_exact_where_its_terms_cancel(streamed: None) -> None:
    """All cosines are 1: the gradients of scale and bias are the same sum, which vanishes at its minimum."""
    ones = torch.ones(64, 1)
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-2 - math.log(63), requires_grad=True)
    for grad in torch.autograd.grad(sigmoid_loss(ones, ones, scale, bias), (scale, bias)):
        assert abs(grad) <= 8 * EPS


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=str)
def test_rows_or_columns_alone_have_no_loss(sizes: tuple[int, int], either_form: None) -> None:
    a, b = features(*sizes)
    labels = torch.arange(sizes[0]), torch.arange(sizes[1])
    loss = sigmoid_loss(a, b, 0.7, -3.0, labels=labels, reduction="none")
    assert torch.equal(loss, torch.zeros(sizes[0]))
    total = sigmoid_loss(a, b, 0.7, -3.0, labels=labels, reduction="sum")
    assert total.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(total, (a, b)))
