"""The plain loss with its logits kept: three products where four would recompute them, while they fit in cache."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkernels._gemm import matmul, matmul_nt
from mmkernels._numerics import widen
from mmkernels._tile import info_nce_tile


class StoredLoss(torch.autograd.Function):
    """Symmetric InfoNCE of `[B, D]` features on a CPU; dL/dS takes the logits' place in the forward pass."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        ctx.dtypes, ctx.alpha = (a.dtype, b.dtype), float(scale)
        a, b = widen(a), widen(b)
        cosines = matmul_nt(a, b)  # [B, B]
        # in a cone of features all cosines are near their mean: see mean_cosine
        center = cosines.mean() if ctx.needs_input_grad[2] else 0.0
        sums = info_nce_tile(cosines, ctx.alpha, center if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(cosines, a, b, scale, sums)
        return sums[0].to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, a, b, scale, sums = ctx.saved_tensors
        needs_a, needs_b, needs_scale = ctx.needs_input_grad
        factor = ctx.alpha * upstream
        da = matmul(grad, b).mul_(factor).to(ctx.dtypes[0]) if needs_a else None
        db = matmul(grad.T, a).mul_(factor).to(ctx.dtypes[1]) if needs_b else None
        dscale = (sums[1] * upstream).to(scale.dtype).view(scale.shape) if needs_scale else None
        return da, db, dscale
