"""Contrastive statistics by tiles of plain ATen calls: what a CPU runs, and float64 on any device.

Each tile of logits lives in a buffer that is allocated once, so that memory stays O(M + N) and the
elementwise passes find the tile in cache. Low-precision operands are widened first: the logits are
accumulated and kept in float32.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mmkernels._gemm import matmul_nt
from mmkernels._numerics import log_sum_exp, widen

# row_lse [M], col_lse [N], positive [M], and the two log-sum-exps' rounding errors
Stats: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# 4 MiB of float32 a tile: large enough for GEMM's full speed, small enough that two of them stay in a
# last-level cache.
TILE = 1024


def tile_shape(num_rows: int, num_cols: int) -> tuple[int, int]:
    """Rows and columns of a tile, a pure function of the problem's shape."""
    return max(min(num_rows, TILE), 1), max(min(num_cols, TILE), 1)


def contrastive_fwd(a: Tensor, b: Tensor, scale: Tensor, offset: int) -> Stats:
    """Row and column log-sum-exp and the positives of `scale * a b^T`, then the two sums' rounding errors."""
    a, b, alpha = widen(a), widen(b), float(scale)
    (num_rows, _), num_cols = a.shape, b.shape[0]
    row_max, row_sum = _empty_sums(a, num_rows)
    col_max, col_sum = _empty_sums(a, num_cols)
    positive = a.new_empty(num_rows)
    rows, cols = tile_shape(num_rows, num_cols)
    buffer = a.new_empty(rows * cols)
    for r in range(0, num_rows, rows):
        a_tile = a[r : r + rows]
        for c in range(0, num_cols, cols):
            b_tile = b[c : c + cols]
            logits = matmul_nt(a_tile, b_tile).mul_(alpha)
            work = _view(buffer, len(a_tile), len(b_tile))
            _add_tile(row_max[r : r + rows], row_sum[r : r + rows], logits, work, dim=1)
            _add_tile(col_max[c : c + cols], col_sum[c : c + cols], logits, work, dim=0)
            first, diagonal = _positives(logits, r + offset - c)
            positive[r + first : r + first + len(diagonal)] = diagonal
    row_lse, row_rest = log_sum_exp(row_max, row_sum)
    col_lse, col_rest = log_sum_exp(col_max, col_sum)
    return row_lse, col_lse, positive, row_rest, col_rest


def contrastive_bwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    stats: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    offset: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `a`, `b` and `scale`, those that `needs` asks for; the tiles of logits are recomputed."""
    a, b, alpha = widen(a), widen(b), float(scale)
    row_lse, col_lse = stats[:2]
    row_coef, col_coef, positive_coef = coefficients(stats, grads, offset)
    (num_rows, _), num_cols = a.shape, b.shape[0]
    needs_a, needs_b, needs_scale = needs
    da = torch.zeros_like(a) if needs_a else None
    db = torch.zeros_like(b) if needs_b else None
    center, dscale = mean_cosine(a, b), grad_total(grads) if needs_scale else None
    if dscale is not None:
        dscale *= center
    rows, cols = tile_shape(num_rows, num_cols)
    buffers = a.new_empty(2, rows * cols)
    for r in range(0, num_rows, rows):
        a_tile, of_rows = a[r : r + rows], slice(r, r + rows)
        for c in range(0, num_cols, cols):
            b_tile, of_cols = b[c : c + cols], slice(c, c + cols)
            cosines = matmul_nt(a_tile, b_tile)
            grad, work = (_view(x, len(a_tile), len(b_tile)) for x in buffers)
            torch.mul(cosines, alpha, out=grad)  # the forward pass's logits, to the bit
            torch.sub(grad, col_lse[of_cols], out=work)
            grad.sub_(row_lse[of_rows, None]).exp_().mul_(row_coef[of_rows, None])
            grad.addcmul_(work.exp_(), col_coef[of_cols])
            first, diagonal = _positives(grad, r + offset - c)
            of_diagonal = slice(r + first, r + first + len(diagonal))
            if dscale is not None:
                diagonal.copy_(positive_coef[of_diagonal])
                dscale += (
                    cosines.sub_(center).mul_(grad).sum()
                )  # summed pairwise, where a dot product would drift
            diagonal.zero_()
            if da is not None:
                da[of_rows] += matmul_nt(grad, b_tile.T)
            if db is not None:
                db[of_cols] += matmul_nt(grad.T, a_tile.T)
    coef = positive_coef[:, None]
    of_positives = slice(offset, offset + num_rows)
    if da is not None:
        da.addcmul_(b[of_positives], coef).mul_(alpha)
    if db is not None:
        db[of_positives].addcmul_(a, coef)
        db.mul_(alpha)
    return da, db, dscale


def coefficients(
    stats: tuple[Tensor, ...], grads: tuple[Tensor, ...], offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of exp(S - row_lse) [M] and of exp(S - col_lse) [N] in dL/dS, and dL/dS of each row's positive
    [M].

    The positive's is applied apart from the tiles, so that no rounding of a tile touches it.
    """
    row_lse, col_lse, positive, row_rest, col_rest = stats
    d_row, d_col, d_pos = grads
    row_coef = d_row * torch.exp(-row_rest)
    col_coef = d_col * torch.exp(-col_rest)
    of_positives = slice(offset, offset + len(positive))
    from_rows = (positive - row_lse).exp_().mul_(row_coef)
    from_cols = (positive - col_lse[of_positives]).exp_().mul_(col_coef[of_positives])
    return row_coef, col_coef, from_rows.add_(from_cols).add_(d_pos)


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """The mean of `a b^T`, float32 or float64, a scalar; of none, zero.

    The scale's gradient is the sum of dL/dS * (a b^T - mean) plus mean * sum of dL/dS: in a cone of features,
    where all cosines are near .9 and dL/dS sums to zero, the first sum alone would be all cancellation.
    """
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    if not len(a):
        return a.new_zeros((), dtype=dtype)
    return a.mean(0, dtype=dtype).dot(b.mean(0, dtype=dtype))


def grad_total(grads: tuple[Tensor, ...]) -> Tensor:
    """The sum of dL/dS in float64: each row's and each column's probabilities sum to one."""
    return torch.stack([d.sum(dtype=torch.float64) for d in grads]).sum()


def _empty_sums(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return like.new_full((size,), -torch.inf), like.new_zeros(size)


def _view(buffer: Tensor, rows: int, cols: int) -> Tensor:
    return buffer[: rows * cols].view(rows, cols)


def _add_tile(running_max: Tensor, running_sum: Tensor, logits: Tensor, work: Tensor, dim: int) -> None:
    """Fold a tile into `sum exp(logits - max)` along `dim`, online."""
    new_max = torch.maximum(running_max, logits.amax(dim))
    torch.sub(logits, new_max.unsqueeze(dim), out=work)
    running_sum.mul_(running_max.sub_(new_max).exp_()).add_(work.exp_().sum(dim))
    running_max.copy_(new_max)


def _positives(tile: Tensor, shift: int) -> tuple[int, Tensor]:
    """The tile's entries with column = row + shift, a view, and the first such row."""
    rows, cols = tile.shape
    if not -rows < shift < cols:
        return 0, tile[0, :0]
    return max(-shift, 0), tile.diagonal(shift)
