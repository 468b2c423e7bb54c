"""The plain loss with its logits kept: three products where four would recompute them, while they fit in cache."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkernels._gemm import matmul, matmul_nt
from mmkernels._numerics import widen
from mmkernels._tile import fold_tile, grad_tile


class StoredLoss(torch.autograd.Function):
    """Symmetric InfoNCE of `[B, D]` features on a CPU; dL/dS takes the logits' place in the forward pass."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        ctx.dtypes, ctx.alpha = (a.dtype, b.dtype), float(scale)
        ctx.needs = any(ctx.needs_input_grad)
        size, a, b = len(a), widen(a), widen(b)
        cosines = matmul_nt(a, b)  # [B, B]
        maxima, sums = a.new_full((2, size), -torch.inf), a.new_zeros(2, size)
        fold_tile(cosines, ctx.alpha, maxima[0], sums[0], maxima[1], sums[1])
        of_pairs = cosines.diagonal().clone()
        loss = (sums.log() + (maxima - ctx.alpha * of_pairs)).sum() / (2 * size)
        if ctx.needs:
            # relative to the maxima, not to a rounded log-sum-exp
            coef = sums.reciprocal_().div_(2 * size)
            center = cosines.mean() if ctx.needs_input_grad[2] else None
            grad, rows, cols = cosines, (maxima[0], coef[0]), (maxima[1], coef[1])
            total = grad_tile(cosines, ctx.alpha, rows, cols, None, center, grad)
            if center is not None:
                total -= (of_pairs - center).sum() / size
            grad.diagonal().sub_(1 / size)
            ctx.save_for_backward(grad, a, b, scale, total)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, a, b, scale, total = ctx.saved_tensors
        needs_a, needs_b, needs_scale = ctx.needs_input_grad
        factor = ctx.alpha * upstream
        da = matmul(grad, b).mul_(factor).to(ctx.dtypes[0]) if needs_a else None
        db = matmul(grad.T, a).mul_(factor).to(ctx.dtypes[1]) if needs_b else None
        dscale = (total * upstream).to(scale.dtype).view(scale.shape) if needs_scale else None
        return da, db, dscale
