"""Contrastive statistics by tiles of plain ATen calls: what a CPU runs, and float64 on any device.

Each tile of logits lives in a buffer that is allocated once, so that memory stays O(M + N) and the
elementwise passes find the tile in cache. Low-precision operands are widened first: the logits are
accumulated and kept in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmkernels._gemm import FAST_BFLOAT16, matmul, matmul_nt
from mmkernels._numerics import log_sum_exp, widen
from mmkernels._tile import fold_tile, grad_tile
from mmkernels.contrastive.problem import (
    Coefficients,
    ContrastiveStats,
    Problem,
    add_positives,
    coefficients,
    grad_total,
    mean_cosine,
)

# 4 MiB of float32 a tile: large enough for GEMM's full speed, small enough that two of them stay in a
# last-level cache.
TILE = 1024
# Columns of dL/dS in bfloat16 side by side: 16 MiB.
LOW_SPAN = 8192


def contrastive_fwd(problem: Problem) -> ContrastiveStats:
    """Log-sum-exps, positives and the teacher's expectations of `scale * a b^T`, tile by tile."""
    problem = _widened(problem)
    a, b, scale = problem.a, problem.b, float(problem.scale)
    row, col = _Sums(a, len(a)), _Sums(a, len(b) if problem.symmetric else 0)
    teacher_row = _Sums(a, len(a) if problem.teacher else 0)
    teacher_col = _Sums(a, len(b) if problem.teacher and problem.symmetric else 0)
    positive = a.new_zeros(0 if problem.positives is None else len(a))
    for of_rows, of_cols in _tiles(len(a), len(b), TILE):
        cosines = _cosines(problem, of_rows, of_cols)
        if problem.positives is not None:
            _take_positives(cosines, problem.positives[of_rows] - of_cols.start, scale, positive[of_rows])
        exclude = None if problem.exclude is None else problem.exclude[of_rows] - of_cols.start
        if problem.teacher is not None:
            of_teacher = matmul_nt(problem.teacher[0][of_rows], problem.teacher[1][of_cols])
            fold_tile(
                of_teacher,
                scale,
                *teacher_row.of(of_rows),
                *(teacher_col.of(of_cols) if problem.symmetric else ()),
                values=cosines,
                row_cross=teacher_row.cross[of_rows],
                col_cross=teacher_col.cross[of_cols] if problem.symmetric else None,
                exclude=exclude,
            )
        of_both = col.of(of_cols) if problem.symmetric else ()
        fold_tile(cosines, scale, *row.of(of_rows), *of_both, exclude=exclude)
    (row_lse, row_rest), (col_lse, col_rest) = log_sum_exp(row.max, row.sum), log_sum_exp(col.max, col.sum)
    return ContrastiveStats(
        row_lse,
        col_lse,
        positive,
        scale * teacher_row.cross / teacher_row.sum,
        scale * teacher_col.cross / teacher_col.sum,
        row_rest,
        col_rest,
        teacher_row.max + teacher_row.sum.log(),
        teacher_col.max + teacher_col.sum.log(),
        torch.zeros_like(positive),
    )


def contrastive_bwd(
    problem: Problem, stats: ContrastiveStats, grads: list[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `a`, `b` and `scale`, those that `needs` asks for; the tiles of logits are recomputed.

    dL/dS is rounded to bfloat16 where the operands are that and its products are the faster ones: what the
    GPU's path does. The positives' share never passes through it.
    """
    low = problem.a.dtype == torch.bfloat16 and FAST_BFLOAT16 and problem.teacher is None
    factors = (problem.a, problem.b) if low else (widen(problem.a), widen(problem.b))
    problem, scale = _widened(problem), float(problem.scale)
    a, b = problem.a, problem.b
    coefs = coefficients(problem, stats, grads)
    needs_a, needs_b, needs_scale = needs
    da = torch.zeros_like(a) if needs_a else None
    db = torch.zeros_like(b) if needs_b else None
    center = mean_cosine(problem)
    of_tiles = a.new_zeros((), dtype=torch.float64)
    # in bfloat16 some tiles side by side: each product is rounded, so it had better be a long sum
    span = LOW_SPAN if low else TILE
    buffer = factors[0].new_empty(min(len(a), TILE), min(len(b), span))
    for of_rows, of_span in _tiles(len(a), len(b), span):
        grad = buffer[: of_rows.stop - of_rows.start, : of_span.stop - of_span.start]
        for first in range(of_span.start, of_span.stop, TILE):
            of_cols = slice(first, min(first + TILE, of_span.stop))
            out = grad[:, first - of_span.start :][:, : of_cols.stop - first]
            of_tiles += _grad_tile(problem, stats, coefs, (of_rows, of_cols), center, out)
        if da is not None:
            da[of_rows] += matmul(grad, factors[1][of_span])
        if db is not None:
            db[of_span] += matmul(grad.T, factors[0][of_rows])
    of_positives = add_positives(problem, coefs.positive, da, db, center)
    for dx in (da, db):
        if dx is not None:
            dx.mul_(scale)
    return da, db, of_tiles + of_positives + center * grad_total(problem, grads) if needs_scale else None


def _grad_tile(
    problem: Problem,
    stats: ContrastiveStats,
    coefs: Coefficients,
    place: tuple[slice, slice],
    center: Tensor,
    out: Tensor,
) -> Tensor:
    """Write a tile of dL/dS, zero at positives and at what is excluded; returns its share of the scale's gradient."""
    of_rows, of_cols = place
    cosines = _cosines(problem, of_rows, of_cols)
    exclude = None if problem.exclude is None else problem.exclude[of_rows] - of_cols.start
    total = grad_tile(
        cosines,
        float(problem.scale),
        (stats.row_lse[of_rows], coefs.row[of_rows]),
        (stats.col_lse[of_cols], coefs.col[of_cols]) if problem.symmetric else None,
        None if problem.positives is None else problem.positives[of_rows] - of_cols.start,
        center,
        out,
        exclude,
    )
    if problem.teacher is None:
        return total
    of_teacher = matmul_nt(problem.teacher[0][of_rows], problem.teacher[1][of_cols])
    grad_tile(
        of_teacher,
        float(problem.scale),
        (stats.teacher_row_lse[of_rows], coefs.teacher_row[of_rows]),
        (stats.teacher_col_lse[of_cols], coefs.teacher_col[of_cols]) if problem.symmetric else None,
        None,
        None,
        of_teacher,
        exclude,
    )
    out.add_(of_teacher)
    return total + cosines.sub(center).mul_(of_teacher).sum(dtype=torch.float64)


def _cosines(problem: Problem, of_rows: slice, of_cols: slice) -> Tensor:
    """A tile of `a b^T`, not to be written to."""
    if problem.cosines is not None:
        return problem.cosines[of_rows, of_cols]
    return matmul_nt(problem.a[of_rows], problem.b[of_cols])


class _Sums:
    """Online `sum exp(x - max)` and `sum exp(x - max) y` of `size` rows or columns."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.max = like.new_full((size,), -torch.inf)
        self.sum, self.cross = like.new_zeros(2, size)

    def of(self, place: slice) -> tuple[Tensor, Tensor]:
        return self.max[place], self.sum[place]


def _tiles(num_rows: int, num_cols: int, width: int) -> Iterator[tuple[slice, slice]]:
    for r in range(0, num_rows, TILE):
        for c in range(0, num_cols, width):
            yield slice(r, min(r + TILE, num_rows)), slice(c, min(c + width, num_cols))


def _widened(problem: Problem) -> Problem:
    teacher_a, teacher_b = (None if x is None else widen(x) for x in (problem.teacher_a, problem.teacher_b))
    return replace(problem, a=widen(problem.a), b=widen(problem.b), teacher_a=teacher_a, teacher_b=teacher_b)


def _take_positives(cosines: Tensor, place: Tensor, scale: float, out: Tensor) -> None:
    """Write the logits at column `place[i]` of row i of the tile, where there is such a column."""
    inside = (place >= 0) & (place < cosines.shape[1])
    found = cosines.gather(1, place.clamp(0, cosines.shape[1] - 1)[:, None])[:, 0]
    torch.where(inside, found * scale, out, out=out)
