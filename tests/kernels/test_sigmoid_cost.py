"""The sigmoid loss's cost, counted in matrix products: three for a loss and all its gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmkernels import sigmoid_loss
from mmkernels._device import INTERPRETED
from mmkernels.sigmoid import blockwise

pytestmark = pytest.mark.skipif(INTERPRETED, reason="of the blockwise path")


def leaves() -> list[Tensor]:
    """Of one small tile: features, scale and bias."""
    torch.manual_seed(0)
    values = torch.randn(20, 24), torch.randn(20, 24), torch.tensor(0.7), torch.tensor(-3.0)
    return [x.requires_grad_() for x in values]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch, streamed: None) -> Iterator[list[int]]:
    """The matrix products of one tile so far, in a list of one number."""
    count = [0]

    def counted(x: Tensor, y: Tensor) -> Tensor:
        count[0] += 1
        return matmul_nt(x, y)

    matmul_nt = blockwise.matmul_nt
    monkeypatch.setattr(blockwise, "matmul_nt", counted)
    yield count


@pytest.mark.parametrize(
    ("wrt", "of_forward"), [("absb", 3), ("as", 2), ("b", 2), ("st", 1), ("", 1)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_all_products_are_made_in_forward_and_only_those_asked_for(
    wrt: str, of_forward: int, compiled: bool, products: list[int]
) -> None:
    torch._dynamo.reset()
    inputs = [x.detach().requires_grad_(name in wrt) for name, x in zip("abst", leaves())]
    fn = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager") if compiled else sigmoid_loss
    loss = fn(*inputs)
    assert products == [of_forward]
    if wrt:
        loss.backward()
    assert products == [of_forward]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_without_gradients_a_forward_is_one_product(compiled: bool, products: list[int]) -> None:
    torch._dynamo.reset()
    inputs = leaves()
    fn = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager") if compiled else sigmoid_loss
    with torch.no_grad():
        fn(*inputs)
    with torch.inference_mode():
        fn(*inputs)
    assert products == [2]


def test_the_loss_of_each_row_costs_four_products(products: list[int]) -> None:
    a, b, scale, bias = leaves()
    loss = sigmoid_loss(a, b, scale, bias, reduction="none")
    assert products == [1]
    loss.sum().backward()
    assert products == [4]


def test_autocast_still_makes_gradients_in_forward(products: list[int]) -> None:
    a, b, scale, bias = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_loss(a, b, scale, bias)
    loss.backward()
    assert products == [3]
