"""The contrastive statistics of the global batch: each rank's rows against all columns, every tile of logits
computed once, and the columns' statistics reduced over the ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.losses.ranks import Layout
from mmcore.losses.shards import Shards
from mmcore.losses.softmax import Softmax, at_columns, excess, in_block, merged, own_excess, reduced, rounded
from mmkernels.pieces import (
    NO_UNDERFLOW_SCALE,
    ContrastiveProblem,
    ContrastiveStats,
    accumulator,
    contrastive_block,
    contrastive_block_grads,
    label_sums,
    mean_cosine,
    poisoned,
)

IS_OF_COLS = [name in ("col_lse", "col_cross", "col_rest", "teacher_col_lse") for name in ContrastiveStats._fields]


@dataclass(frozen=True)
class Columns:
    """What this rank's rows are held against.

    `positives`: int64 `[m]`, the global column of a row's first positive, -1 if none. `labels`: of this rank's
    rows `[m]` and of all columns `[N]`; times `weights` `[N]`, the sum of b over a row's positives is their mean
    less the first one. `normalized`: whether the kernels go by that claim; `broken`: on a GPU, whether it is
    broken (bool).
    """

    layout: Layout
    shards: Shards
    positives: Tensor
    labels: tuple[Tensor, Tensor] | None
    weights: Tensor | None
    negatives: Tensor | None
    teacher_a: Tensor | None
    symmetric: bool
    normalized: bool
    broken: Tensor | None

    def blocks(self, a: Tensor, scale: Tensor) -> Iterator[tuple[slice | None, ContrastiveProblem]]:
        """Which columns of the batch, and the rows against them; the negatives, which are none, last."""
        for cols, (b, *of_teacher) in self.shards.blocks():
            place = in_block(self.positives, cols, len(b))
            teacher_b = of_teacher[0] if of_teacher else None
            yield cols, ContrastiveProblem(a, b, scale, place, self.teacher_a, teacher_b, self.symmetric)
        if self.negatives is not None:
            none = torch.full_like(self.positives, -1)
            teacher_b = None if self.teacher_a is None else self.negatives
            yield None, ContrastiveProblem(a, self.negatives, scale, none, self.teacher_a, teacher_b, False)


class GlobalStats(torch.autograd.Function):
    """`ContrastiveStats` in float64, of this rank's rows against all columns (and the negatives) and of all
    columns against all rows; and for each row the mean of its positives less the first, `[m, D]`, if labelled.

    Every rank has the same statistics of the columns; their gradient is the sum of what the ranks' losses give.
    The backward computes each block again from the log-sum-exps of the whole.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor, columns: Columns):
        a, scale = a.detach(), scale.detach()
        parts, centers = [], []
        positive = a.new_zeros(len(a), dtype=torch.float64)
        target = a.new_zeros(a.shape if columns.labels else 0, dtype=accumulator(a.dtype))
        # room for every column of the batch, or for none
        num_cols = sum(columns.layout.cols) if columns.symmetric else 0
        num_taught = 0 if columns.teacher_a is None else num_cols
        sizes = num_cols, num_cols, num_taught, num_taught
        of_cols = Softmax(*(a.new_zeros(n, dtype=torch.float64) for n in sizes))
        for cols, problem in columns.blocks(a, scale):
            stats = _block_stats(problem, columns.normalized)
            parts.append(stats)
            centers.append(mean_cosine(problem))
            if cols is None:
                continue
            positive += stats.positive
            own_cols = stats.col_lse, stats.col_rest, stats.teacher_col_lse, stats.col_cross
            for whole, part in zip(of_cols, own_cols, strict=True):
                whole[cols] = part
            if columns.labels is not None and columns.weights is not None:
                weighted = problem.b.to(target.dtype) * columns.weights[cols, None]
                target += label_sums(weighted, columns.labels[1][cols], columns.labels[0])
        of_rows = merged([Softmax(p.row_lse, p.row_rest, p.teacher_row_lse, p.row_cross) for p in parts])
        if columns.symmetric:
            of_cols = merged([of_cols], columns.layout.group, over_ranks=True)
        lse, rest = (of_rows.lse, of_cols.lse), (of_rows.rest, of_cols.rest)
        of_teacher = of_rows.teacher_lse, of_cols.teacher_lse
        stats = ContrastiveStats(*lse, positive, of_rows.cross, of_cols.cross, *rest, *of_teacher)
        if columns.normalized:
            stats = poisoned(stats, scale, columns.broken)
        ctx.columns, ctx.parts, ctx.centers = columns, parts, centers
        ctx.save_for_backward(a, scale, *stats)
        ctx.mark_non_differentiable(*stats[5:])
        return *stats, target

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        a, scale, *saved = ctx.saved_tensors
        columns, stats, needs = ctx.columns, ContrastiveStats(*saved), list(ctx.needs_input_grad[:3])
        dtype = accumulator(a.dtype)
        d_stats, center = reduced(grads[:5], IS_OF_COLS, ctx.centers, columns.layout.group)
        of_rows, own_cols, all_cols = (grads[0], grads[3]), (grads[1], grads[4]), (d_stats[1], d_stats[4])
        in_dtype = rounded(stats, dtype)
        da = torch.zeros_like(a, dtype=dtype)
        ds = center * own_excess(of_rows, own_cols, all_cols, len(ctx.parts))
        for (cols, problem), part, part_center in zip(columns.blocks(a, scale), ctx.parts, ctx.centers, strict=True):
            of_block = [x.to(dtype) for x in at_columns(d_stats, IS_OF_COLS, cols)]
            # the op takes each of these for a part of its dL/dS
            assert problem.positives is not None
            of_block[2] = of_block[2].where(problem.positives >= 0, 0.0)
            wanted = [needs[0], needs[1] and cols is not None, needs[2]]
            da_part, db, ds_part = contrastive_block_grads(
                problem, at_columns(in_dtype, IS_OF_COLS, cols), of_block, wanted
            )
            if needs[0]:
                da += da_part
            if needs[2]:
                whole = ContrastiveStats(*at_columns(stats, IS_OF_COLS, cols))
                ds += ds_part + (part_center - center) * _excess(part, whole, of_block)
            if needs[1] and cols is not None:
                db = db.to(dtype)
                if columns.labels is not None and columns.weights is not None:
                    of_positives = label_sums(grads[9], columns.labels[0], columns.labels[1][cols])
                    db += of_positives * columns.weights[cols, None]
                columns.shards.add_grad(db)
        return (
            da.to(a.dtype) if needs[0] else None,
            columns.shards.own_grad().to(a.dtype) if needs[1] else None,
            ds.to(scale.dtype) if needs[2] else None,
            None,
        )


def _block_stats(problem: ContrastiveProblem, normalized: bool) -> ContrastiveStats:
    stats = ContrastiveStats(*(x.double() for x in contrastive_block(problem, normalized=normalized)))
    if not normalized:
        return stats

    def revived(lse: Tensor) -> Tensor:
        """A sum that lost its terms to underflow adds nothing here; the whole is judged when it is complete."""
        return torch.where(lse.isnan() & (problem.scale > NO_UNDERFLOW_SCALE), -torch.inf, lse)

    return stats._replace(row_lse=revived(stats.row_lse), col_lse=revived(stats.col_lse))


def _excess(part: ContrastiveStats, whole: ContrastiveStats, grads: Sequence[Tensor]) -> Tensor:
    d_row, d_col, _, d_row_cross, d_col_cross = grads
    return excess(
        (d_row, part.row_lse + part.row_rest, whole.row_lse + whole.row_rest),
        (d_col, part.col_lse + part.col_rest, whole.col_lse + whole.col_rest),
        (d_row_cross, part.teacher_row_lse, whole.teacher_row_lse),
        (d_col_cross, part.teacher_col_lse, whole.teacher_col_lse),
    )
