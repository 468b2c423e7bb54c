"""Small shapes, every logit stored: the reference on widened features, on a CPU or one pass over the tile."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels import native
from mmkernels._autograd import is_transforming
from mmkernels._cost import Composition
from mmkernels._device import may_compose, runs_triton
from mmkernels._gemm import factor, low_like, matmul, matmul_nt
from mmkernels._numerics import widen
from mmkernels._tile import sigmoid_tile
from mmkernels.sigmoid.reference import sigmoid_loss_ref

# Logits that stay in a CPU's cache cost less stored than a call of the registered op.
EAGER_LOGITS = 1 << 15
# Up to 4 MiB of them one pass over the tile is all of it.
STORED_LOGITS = 1024 * 1024 + 1
# The reference on a GPU.
ON_GPU = Composition(
    most_logits=1 << 19, host_us=115, launches=26, bytes_per_logit=120, products=3,
    kernels_host_us=300, kernels_launches=9,
)  # fmt: skip


def is_faster(a: Tensor, b: Tensor) -> bool:
    """A pure function of shapes and device type."""
    if may_compose(a):
        return ON_GPU.is_faster(a.shape[0] * b.shape[0], a.shape[1])
    return _fits(a, b, EAGER_LOGITS)


def is_stored(a: Tensor, b: Tensor, reduction: str) -> bool:
    """Whether `StoredLoss` serves."""
    if is_compiling() or is_transforming() or not native.AVAILABLE or a.dtype == torch.float64:
        return False
    return reduction != "none" and _fits(a, b, STORED_LOGITS)


def _fits(a: Tensor, b: Tensor, most: int) -> bool:
    return not a.is_cuda and not runs_triton(a) and 0 < a.shape[0] * b.shape[0] < most


def sigmoid_loss_eager(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, labels: tuple[Tensor, Tensor] | None, reduction: str
) -> Tensor:
    return sigmoid_loss_ref(widen(a), widen(b), scale, bias, labels=labels, reduction=reduction)


class StoredLoss(torch.autograd.Function):
    """The mean or the sum; the logits' gradient takes the cosines' place in the forward."""

    @staticmethod
    def forward(
        ctx, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, labels: tuple[Tensor, Tensor] | None, reduction: str
    ) -> Tensor:
        ctx.labels, ctx.reduction = labels, reduction
        given = (a, b, scale, bias)
        a, b = factor(a), factor(b)
        cosines = matmul_nt(a, b)  # [M, N]
        diagonal = torch.arange(len(a)) if labels is None else None
        row_label, col_label = (diagonal, diagonal) if labels is None else (x.contiguous() for x in labels)
        assert row_label is not None and col_label is not None
        row_loss = cosines.new_zeros(len(a))
        out = cosines if any(ctx.needs_input_grad) else None
        sums = sigmoid_tile(cosines, scale.item(), bias.item(), row_label, col_label, row_loss, out)
        if reduction == "mean":
            sums = sums / len(a)
        ctx.save_for_backward(cosines, a, b, sums, *given)
        return sums[0].to(cosines.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, a, b, sums, *given = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # a second derivative is asked for, which the reference has
            wanted = [x for x, needed in zip(given, needs, strict=True) if needed]
            loss = sigmoid_loss_ref(*map(widen, given[:2]), *given[2:], labels=ctx.labels, reduction=ctx.reduction).to(
                upstream.dtype
            )
            found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
            return *(next(found) if needed else None for needed in needs), None, None
        scale, bias = given[2:]
        factor_of = float(scale) * float(upstream) / (len(a) if ctx.reduction == "mean" else 1)
        grad = low_like(grad, a)
        grads = (
            matmul(grad, b).mul_(factor_of) if needs[0] else None,
            matmul(grad.T, a).mul_(factor_of) if needs[1] else None,
            (sums[2] * upstream).view(scale.shape) if needs[2] else None,
            (sums[1] * upstream).view(bias.shape) if needs[3] else None,
        )
        return *(None if dx is None else dx.to(x.dtype) for dx, x in zip(grads, given, strict=True)), None, None
