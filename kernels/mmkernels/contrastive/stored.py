"""The plain loss with its logits kept: three products where four would recompute them, while they fit in cache."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkernels._gemm import matmul, matmul_nt
from mmkernels._numerics import widen
from mmkernels._tile import info_nce_tile


class StoredLoss(torch.autograd.Function):
    """Symmetric InfoNCE of `[B, D]` features on a CPU; the cosines' gradient takes their place in the forward."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        ctx.dtypes = (a.dtype, b.dtype, scale.dtype)
        a, b = widen(a), widen(b)
        cosines = matmul_nt(a, b)  # [B, B]
        # in a cone of features all cosines are near their mean: see mean_cosine
        center = cosines.mean() if ctx.needs_input_grad[2] else 0.0
        sums = info_nce_tile(cosines, scale.item(), center if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(cosines, a, b, scale, sums)
        return sums[0].to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, a, b, scale, sums = ctx.saved_tensors
        needs_a, needs_b, needs_scale = ctx.needs_input_grad
        da = matmul(grad, b) if needs_a else None
        db = matmul(grad.T, a) if needs_b else None
        dscale = sums[1].view(scale.shape) if needs_scale else None
        grads = (da, db, dscale)
        if upstream.item() != 1:
            grads = (None if dx is None else dx * upstream for dx in grads)
        return tuple(None if dx is None else dx.to(dtype) for dx, dtype in zip(grads, ctx.dtypes, strict=True))
