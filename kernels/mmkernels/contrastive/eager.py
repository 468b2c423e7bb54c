"""Small shapes, every logit stored: three products, where four would recompute them. On a GPU the fewest calls."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels._autograd import is_transforming
from mmkernels._checks import in_range
from mmkernels._cost import Composition
from mmkernels._device import may_compose
from mmkernels._gemm import factor, matmul, matmul_nt
from mmkernels._numerics import widen
from mmkernels._tile import info_nce_tile
from mmkernels.contrastive.op import logits_are_kept
from mmkernels.contrastive.reference import contrastive_loss_ref

# Of fewer logits on a CPU, calls are what the variants cost, and the reference has the fewest.
EAGER_LOGITS = 512 * 1024
# The reference on a GPU: of hard targets on the diagonal, and of every other variant, the one that costs most there
# beside the one that costs least by statistics.
OF_PAIRS = Composition(
    most_logits=1 << 20, host_us=155, launches=29, bytes_per_logit=120, products=3,
    kernels_host_us=460, kernels_launches=13,
)  # fmt: skip
OF_VARIANTS = Composition(
    most_logits=1 << 20, host_us=530, launches=90, bytes_per_logit=400, products=4,
    kernels_host_us=800, kernels_launches=84,
)  # fmt: skip


def form_of(
    a: Tensor, b: Tensor, negatives: Tensor | None, *, normalized: bool, is_plain: bool, is_of_pairs: bool
) -> str | None:
    """Which form stores the whole matrix of logits: "stored" is `StoredLoss`, "eager" `contrastive_loss_eager`; None
    where the statistics serve, or kernels. `is_plain`: without any option, `is_of_pairs`: of hard targets on the
    diagonal. A pure function of shapes, dtype and device type."""
    num_cols = len(b) + (0 if negatives is None else len(negatives))
    if may_compose(a):
        composition = OF_PAIRS if is_of_pairs else OF_VARIANTS
        return "eager" if len(b) and composition.is_faster(len(a) * num_cols, a.shape[1]) else None
    # a compiled graph cannot raise
    if not logits_are_kept(a, num_cols) or (normalized and is_compiling()):
        return None
    if is_plain and not is_compiling():
        return "eager" if is_transforming() else "stored"
    return "eager" if len(a) * num_cols < EAGER_LOGITS else None


def contrastive_loss_eager(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    positives: Tensor | None,
    negatives: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    **options: Any,
) -> Tensor:
    """The reference on widened features; `options` are the other arguments of `contrastive_loss`."""
    is_right = None
    if positives is not None and a.is_cuda:
        positives, is_right = in_range(positives, len(b))
    loss = contrastive_loss_ref(
        widen(a),
        widen(b),
        scale,
        positives=positives,
        negatives=None if negatives is None else widen(negatives),
        teacher=None if teacher is None else (widen(teacher[0]), widen(teacher[1])),
        **options,
    )
    if is_right is None:
        return loss
    return loss * (is_right if loss.ndim else is_right.mean())


class StoredLoss(torch.autograd.Function):
    """Symmetric InfoNCE of `[B, D]` features on a CPU; the cosines' gradient takes their place in the forward."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        given = (a, b)
        a, b = factor(a), factor(b)
        cosines = matmul_nt(a, b)  # [B, B]
        # in a cone of features all cosines are near their mean: see mean_cosine
        center = cosines.mean() if ctx.needs_input_grad[2] else 0.0
        sums = info_nce_tile(cosines, scale.item(), center if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(cosines, a, b, scale, sums, *given)
        return sums[0].to(cosines.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, a, b, scale, sums, *given = ctx.saved_tensors
        needs_a, needs_b, needs_scale = ctx.needs_input_grad
        inputs = (*given, scale)
        if torch.is_grad_enabled():  # a second derivative is asked for, which the reference has
            wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            loss = contrastive_loss_ref(widen(given[0]), widen(given[1]), scale).to(upstream.dtype)
            found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        pairs = None
        if grad.dtype != a.dtype:  # what is rounded for the products is not the positives' share
            pairs, grad = grad.diagonal()[:, None], grad.to(a.dtype).fill_diagonal_(0)
        da = matmul(grad, b) if needs_a else None
        db = matmul(grad.T, a) if needs_b else None
        if pairs is not None:
            da, db = (None if dx is None else dx.addcmul_(pairs, x) for dx, x in ((da, b), (db, a)))
        dscale = sums[1].view(scale.shape) if needs_scale else None
        grads = (da, db, dscale)
        if upstream.item() != 1:
            grads = (None if dx is None else dx * upstream for dx in grads)
        return tuple(
            None if dx is None else dx.to(dtype) for dx, dtype in zip(grads, [x.dtype for x in inputs], strict=True)
        )
