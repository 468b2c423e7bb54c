"""The sigmoid loss by tiles: what a CPU runs, and float64 on any device.

Each tile of logits is computed once and overwritten by dL/dx, so that memory stays O(M + N). Low-precision
operands are widened first, or where the processor multiplies bfloat16 at more than float32's speed, taken as they are,
and dL/dx rounded to them for the products: the logits are accumulated and kept in float32 either way.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._gemm import add_matmul, factor, low_like, matmul_nt
from mmkernels._tile import sigmoid_tile

# `[n, M]` in float64, of which the first are each row's loss; the gradients of `sum coef * loss` of a and b, None where
# nobody asked; and `[1 or 3]`, float64, the sum of the losses and, where needed, the gradients of scale and bias.
Made: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor]

# 4 MiB of float32 a tile: large enough for GEMM's full speed, small enough to stay in a last-level cache.
TILE = 1024


def sigmoid_fwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    coef: Tensor | None,
    needs: Sequence[bool],
) -> Made:
    """`coef` is `[M]`, None for ones. Gradients of features are accumulated in float32 (float64), those of scale and
    bias in float64."""
    a, b, alpha, beta, dtype = factor(a), factor(b), float(scale), float(bias), accumulator(a.dtype)
    diagonal = torch.arange(len(a), device=a.device)
    row_label, col_label = (x.contiguous() for x in labels or (diagonal, diagonal))
    loss = a.new_zeros(len(a), dtype=torch.float64)
    da, db = (torch.zeros_like(x, dtype=dtype) if needed else None for x, needed in zip((a, b), needs))
    dbias, dscale = (loss.new_zeros(()) for _ in range(2))
    for r in range(0, len(a), TILE):
        of_rows = slice(r, min(r + TILE, len(a)))
        for c in range(0, len(b), TILE):
            of_cols = slice(c, min(c + TILE, len(b)))
            tile = matmul_nt(a[of_rows], b[of_cols])
            row_loss = loss.new_zeros(len(tile), dtype=tile.dtype)
            labels_of = row_label[of_rows], col_label[of_cols]
            if coef is None:
                grad = torch.empty_like(tile, dtype=a.dtype) if a.dtype != tile.dtype else tile
                sums = sigmoid_tile(tile, alpha, beta, *labels_of, row_loss, grad if any(needs) else None)
            else:
                cosines = tile.clone()
                sigmoid_tile(cosines, alpha, beta, *labels_of, row_loss, tile)
                tile.mul_(coef[of_rows, None])
                weighted = tile.sum(1), cosines.mul_(tile).sum(1)
                sums = torch.stack([row_loss, *weighted]).sum(1, dtype=torch.float64)
                grad = low_like(tile, a)
            loss[of_rows] += row_loss
            dbias += sums[1]
            dscale += sums[2]
            if da is not None:
                add_matmul(da[of_rows], grad, b[of_cols])
            if db is not None:
                add_matmul(db[of_cols], grad.T, a[of_rows])
    for dx in (da, db):
        if dx is not None:
            dx.mul_(alpha)
    return loss[None], da, db, torch.stack([loss.sum(), dscale, dbias] if any(needs[2:]) else [loss.sum()])
