"""`mmcore.nn.Linear` is torch's in value and gradient, and steps aside where it cannot be."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.nn import Linear, quicken
from mmcore.nn import linear as module


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the inputs that took the faster products; every size may."""
    seen, apply = [], module._Product.apply
    monkeypatch.setattr(module, "MIN_PRODUCT", 1)
    monkeypatch.setattr(module, "CALLS_ONEDNN", True)
    monkeypatch.setattr(module._Product, "apply", lambda *x: (seen.append(x[0].numel()), apply(*x))[1])
    yield seen


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    torch.manual_seed(0)
    return Linear(19, 33, bias=bias, dtype=dtype)


def gradients(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = F.linear(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 19), (67, 19), (3, 5, 19), (2, 3, 4, 19)])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_are_as_close_to_float64_as_torchs(
    taken: list[int], bias: bool, shape: tuple[int, ...], strided: bool
) -> None:
    ours = layer(bias)
    x = torch.randn(*shape[:-1], 2 * 19)[..., ::2] if strided else torch.randn(shape)
    dy = torch.randn(*shape[:-1], 2 * 33)[..., ::2] if strided else torch.randn(*shape[:-1], 33)
    exact_bias = None if ours.bias is None else ours.bias.double()
    gold = gradients(x.double(), ours.weight.double(), exact_bias, dy.double())
    reference = gradients(x, ours.weight, ours.bias, dy)
    x = x.detach().requires_grad_()
    y = ours(x)
    found = [y, *torch.autograd.grad(y, (x, *ours.parameters()), dy)]
    assert taken
    for ours_, ref, exact in zip(found, reference, gold, strict=True):
        bound = 2 * (ref - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert ours_.shape == exact.shape and (ours_ - exact).abs().max() <= bound


def test_what_is_frozen_gets_no_gradient(taken: list[int]) -> None:
    ours = layer().requires_grad_(False)
    x = torch.randn(4, 19, requires_grad=True)
    ours(x).sum().backward()
    assert taken and ours.weight.grad is None and ours.bias.grad is None
    torch.testing.assert_close(x.grad, ours.weight.sum(0).expand(4, -1))


@pytest.mark.parametrize("shape", [(0, 19), (2, 0, 19)])
def test_no_rows_are_no_rows(taken: list[int], shape: tuple[int, ...]) -> None:
    ours = layer()
    y = ours(torch.zeros(shape, requires_grad=True))
    assert y.shape == (*shape[:-1], 33) and not taken
    y.sum().backward()


def test_other_types_autocast_compile_and_func_are_torchs(taken: list[int]) -> None:
    x = torch.randn(4, 19)
    assert layer(dtype=torch.float64)(x.double()).dtype == torch.float64
    ours = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    expected = F.linear(x, ours.weight, ours.bias)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), expected)
    weights = dict(ours.named_parameters())
    per_row = torch.func.vmap(
        torch.func.grad(lambda w, row: torch.func.functional_call(ours, w, (row,)).sum()), (None, 0)
    )(weights, x)
    torch.testing.assert_close(per_row["weight"], x[:, None].expand(-1, 33, -1))
    assert not taken


def test_the_linear_layers_of_a_model_of_others_take_the_faster_products_too(taken: list[int]) -> None:
    class Other(nn.Linear):
        pass

    theirs = nn.Sequential(nn.Linear(19, 33), nn.Sequential(nn.Linear(33, 7, bias=False)), Other(7, 7))
    x, state = torch.randn(4, 19), theirs.state_dict(keep_vars=True)
    expected = theirs(x)
    quicken(theirs)
    torch.testing.assert_close(theirs(x), expected)
    assert taken == [x.numel(), 4 * 33] and type(theirs[2]) is Other
    found = theirs.state_dict(keep_vars=True)
    assert found.keys() == state.keys() and all(found[name] is state[name] for name in state)


def test_activations_can_be_recomputed(taken: list[int]) -> None:
    ours, x = layer(), torch.randn(4, 19, requires_grad=True)
    checkpoint(lambda t: ours(ours(t)[:, :19]), x, use_reentrant=False).sum().backward()
    found = x.grad
    x.grad = None
    ours(ours(x)[:, :19]).sum().backward()
    torch.testing.assert_close(found, x.grad)
    assert len(taken) > 4


@pytest.mark.parametrize("shape", [(67, 19), (3, 5, 19)])
def test_gradients_arrive_in_one_order_whichever_library_multiplies(
    taken: list[int], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-2 ranks reduce them as they come: one whose batch is small must not differ from the others."""

    def order(least: int) -> list[str]:
        monkeypatch.setattr(module, "MIN_PRODUCT", least)
        first, ours = nn.LayerNorm(19), layer()
        came: list[str] = []
        for name, p in (*first.named_parameters(prefix="norm"), *ours.named_parameters()):
            p.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
        F.gelu(ours(first(torch.randn(shape)))).sum().backward()
        return came

    found = order(1)
    assert len(taken) == 1 and found == order(2**40)
