"""create_graph=True: the right second derivative, or an error; never a term that is missing in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmcore.losses import global_contrastive_loss, global_sigmoid_loss
from mmcore.nn import Linear

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
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(found, penalty(theirs, a), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [8, 40, 200])
def test_the_plain_contrastive_loss_has_second_derivatives_on_a_cpu(count: int) -> None:
    a, b = rows(count), rows(count + 1)[:count]
    ours, theirs = ((lambda a, call=call: call(a, b)) for call in OPS["contrastive"])
    torch.testing.assert_close(penalty(ours, a), penalty(theirs, a), rtol=1e-9, atol=1e-12)


def test_a_layers_product_has_second_derivatives() -> None:
    layer = Linear(64, 64)
    x = torch.randn(40, 64)
    found = penalty(lambda x: layer(x).square().sum(), x)
    wanted = penalty(lambda x: F.linear(x, layer.weight, layer.bias).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("loss", [
    lambda a, b: global_contrastive_loss(a, b, SCALE, gather_limit_bytes=1),
    lambda a, b: global_sigmoid_loss(a, b, SCALE, BIAS, gather_limit_bytes=1),
])  # fmt: skip
def test_losses_over_ranks_are_right_or_refused_on_one(loss: Callable[..., Tensor], one_rank: None) -> None:
    a, b = rows(40), rows(41)[:40]
    try:
        found = penalty(lambda a: loss(a, b), a)
    except (RuntimeError, NotImplementedError) as error:
        assert "create_graph" in str(error) or "derivative" in str(error)
        return
    assert found.isfinite().all()


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
