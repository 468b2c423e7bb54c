"""Linear cross-entropy by tiles of plain ATen calls: what a CPU runs, and float64 on any device.

The logits of a chunk of rows are kept as a list of tiles, each computed once: folded into the rows' sums,
then overwritten by dL/dlogits for the two products. Low-precision operands are widened a tile at a time, or where the
processor multiplies bfloat16 at more than float32's speed, taken as they are, and dL/dlogits rounded to them: the
logits are accumulated and kept in float32 either way.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._gemm import add_matmul, factor, low_like, matmul_nt
from mmkernels._numerics import log_sum_exp, widen
from mmkernels._tile import fold_tile, grad_tile

# each row's log-sum-exp, its rounding error, and the target's logit
Stats: TypeAlias = tuple[Tensor, Tensor, Tensor]
# of rows: targets, the one to ignore, the weight of each loss, and how many count, where ignored ones are behind them
Rows: TypeAlias = tuple[Tensor, int, Tensor, Callable[[], int] | None]
# of hidden, weight and bias; None where nobody asked
Grads: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

# Rows and columns of a tile, large enough for GEMM's full speed, and the fewest rows, at three quarters of that speed.
ROWS, MIN_ROWS, COLS = 512, 64, 1024
BUFFER_BYTES = 64 << 20


def tile_shape(num_rows: int, vocab: int, element_size: int) -> tuple[int, int]:
    """Rows of a chunk and columns of a tile, a pure function of the problem's shape."""
    fitting = BUFFER_BYTES // (vocab * element_size) // MIN_ROWS * MIN_ROWS
    return min(max(fitting, MIN_ROWS), ROWS, max(num_rows, 1)), min(vocab, COLS)


def is_one_chunk(num_rows: int, vocab: int, element_size: int) -> bool:
    """Whether all rows are of one chunk."""
    return num_rows <= tile_shape(num_rows, vocab, element_size)[0]


def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of_rows: Rows,
    mean_logit: Tensor | None,
    terms: Sequence[float],
    grads: Grads,
) -> Tensor:
    """The loss of each row, 0 where it is ignored; the gradients of `sum coef * loss` are written into `grads`.

    `terms` are the label smoothing and the weight of the z-loss. The smoothing's part of the gradients, alike
    in every column, is the caller's. An ignored row's `coef` and `hidden` are 0; of a target outside the vocabulary
    all is NaN. The weight's gradient may be of the operands' dtype where `is_one_chunk`: each of its tiles is then
    complete, and rounded, before the next.
    """
    targets, ignore_index, coef, _ = of_rows
    dh, dw, db = grads
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    kept = targets != ignore_index
    outside = kept & ((targets < 0) | (targets >= vocab))
    targets, coef = torch.where(kept & ~outside, targets, 0), torch.where(outside, torch.nan, coef)
    rows, cols = tile_shape(num_rows, vocab, coef.element_size())
    loss = torch.empty_like(coef)
    keep = any(dx is not None for dx in grads)
    tiles: list[Tensor] = []
    for r in range(0, num_rows, rows):
        part = slice(r, r + rows)
        h, of_part = factor(hidden[part]), targets[part]
        stats = _fold(h, weight, bias, of_part, cols, tiles if keep else None)
        loss[part] = row_loss(stats, None if mean_logit is None else mean_logit[part], terms)
        if not keep:
            continue
        row_coef, target_coef = coefficients(stats, coef[part], terms)
        dh_part = None if dh is None else dh[part].zero_()
        for c, tile in zip(range(0, vocab, cols), tiles):
            of_cols = slice(c, c + cols)
            # a bias's gradient is a sum of what is not rounded
            grad = torch.empty_like(tile, dtype=h.dtype) if db is None and h.dtype != tile.dtype else tile
            grad_tile(tile, 1.0, (stats[0], row_coef), None, of_part - c, None, grad)
            grad = low_like(grad, h)
            if dh_part is not None:
                add_matmul(dh_part, grad, factor(weight[of_cols]))
            if dw is not None and dw.dtype != coef.dtype:
                dw[of_cols] = _rounded(grad, h, of_part - c, target_coef)
            elif dw is not None:  # the first chunk's part is written: adding to zeros would fill [V, D] once more
                add_matmul(dw[of_cols], grad.T, h, add=r > 0)
            if db is not None:
                db[of_cols] = db[of_cols] + tile.sum(0) if r else tile.sum(0)
        wide = None if dw is None or dw.dtype != coef.dtype else dw
        add_targets((dh_part, wide, db), h, weight, of_part, target_coef)
    return loss.masked_fill_(~kept, 0).masked_fill_(outside, torch.nan)


def _rounded(grad: Tensor, h: Tensor, at: Tensor, target_coef: Tensor) -> Tensor:
    """dL/dweight of a tile's columns, [C, D] in float32, to be rounded once: with that of the targets `at` its
    columns."""
    part = torch.empty(grad.shape[1], h.shape[1])
    add_matmul(part, grad.T, h, add=False)
    here = ((at >= 0) & (at < len(part))).nonzero()[:, 0]
    _add_rows(part, at[here], widen(h[here]) * target_coef[here, None])
    return part


def row_loss(stats: Stats, mean_logit: Tensor | None, terms: Sequence[float]) -> Tensor:
    """`lse - (1 - eps) target logit - eps mean logit + z lse^2`; the rest keeps a small loss exact."""
    lse, rest, target_logit = stats
    label_smoothing, z_loss = terms
    loss = (lse - target_logit) + rest
    if mean_logit is not None:
        loss += label_smoothing * (target_logit - mean_logit)
    return loss.add_(lse.square(), alpha=z_loss) if z_loss else loss


def coefficients(stats: Stats, coef: Tensor, terms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The weight of exp(logit - lse) in dL/dlogits, and dL/dlogit of the target without the smoothing's part.

    The target's is applied apart from the tiles, so that no rounding of a tile touches it.
    """
    lse, rest, target_logit = stats
    label_smoothing, z_loss = terms
    scale = torch.exp(-rest)
    of_z = 2 * z_loss * lse
    probability = (target_logit - lse).exp_().mul_(scale)
    # the 1 is taken off first, and exactly
    target_coef = (probability - 1).add_(label_smoothing).addcmul_(probability, of_z).mul_(coef)
    return of_z.add_(1).mul_(scale).mul_(coef), target_coef


def add_targets(grads: Grads, hidden: Tensor, weight: Tensor, targets: Tensor, coef: Tensor) -> None:
    """Add the gradients of `sum coef * target logit` for the rows `hidden`."""
    dh, dw, db = grads
    if dh is not None:
        dh.addcmul_(widen(weight[targets]), coef[:, None])
    if dw is not None:
        _add_rows(dw, targets, widen(hidden) * coef[:, None])
    if db is not None:
        _add_rows(db, targets, coef)


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """`out[index] += rows`, always in the same order: each device has one call that uses no atomics."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)


def _fold(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cols: int, tiles: list[Tensor] | None
) -> Stats:
    """The statistics of the rows `h`; the tiles of their logits replace those in `tiles`."""
    like = h.new_empty(0, dtype=accumulator(h.dtype))
    row_max, row_sum = like.new_full((len(h),), -torch.inf), like.new_zeros(len(h))
    target_logit = torch.empty_like(row_sum)
    for i, c in enumerate(range(0, len(weight), cols)):
        of_cols = slice(c, c + cols)
        tile = matmul_nt(h, factor(weight[of_cols]))
        if bias is not None:
            tile += widen(bias[of_cols])
        fold_tile(tile, 1.0, row_max, row_sum)
        at = targets - c
        last = tile.shape[1] - 1
        found = tile.gather(1, at.clamp(0, last)[:, None])[:, 0]
        target_logit = torch.where((at >= 0) & (at <= last), found, target_logit)
        if tiles is not None:
            # one at a time: memory that is freed whole goes back to the system, and costs page faults again
            tiles[i : i + 1] = [tile]
    return (*log_sum_exp(row_max, row_sum), target_logit)
