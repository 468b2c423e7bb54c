"""InfoNCE over the global batch, exact in value and in gradient on any number of data-parallel ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcore.losses.ranks import OVER_RANKS, Header, Layout, agree, gather_rows, global_mean, header, world_size_of
from mmcore.losses.shards import GATHER_LIMIT_BYTES, Shards, shards_of
from mmcore.losses.softmax import Softmax, at_columns, excess, in_block, merged, own_excess, reduced, rounded
from mmcore.nn.batch_norm import all_sum
from mmkernels import contrastive_loss
from mmkernels.pieces import (
    ContrastiveProblem,
    ContrastiveStats,
    LinearMeans,
    Match,
    Options,
    accumulator,
    broken_claim,
    check_unseen,
    checked_inputs,
    contrastive_block,
    contrastive_block_grads,
    first_match,
    first_order,
    label_sums,
    mean_cosine,
    pair_losses,
    poisoned,
    reduce,
)

OP = "global_contrastive_loss"
IS_OF_COLS = [name in ("col_lse", "col_cross", "col_rest", "teacher_col_lse") for name in ContrastiveStats._fields]


class _Inputs(NamedTuple):
    a: Tensor  # [m, D]
    b: Tensor  # [n, D]
    scale: Tensor  # [], float64
    labels: tuple[Tensor, Tensor] | None
    teacher: tuple[Tensor, Tensor] | None
    negatives: Tensor | None
    broken: Tensor | None
    exclude: Tensor | None


def global_contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    exclude: Tensor | None = None,
    symmetric: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    normalized: bool = False,
    group: dist.ProcessGroup | None = None,
    gather_limit_bytes: int = GATHER_LIMIT_BYTES,
) -> Tensor:
    """`mmkernels.contrastive_loss` of the rows of all ranks: with S = logit_scale * A B^T of the global batch,
    `(mean_i CE(S_i, i) + mean_j CE(S_:j, j)) / 2` and its generalisations.

    Every rank gets the same value. Gradients are scaled so that the *mean* over ranks, which is what DDP and
    DeepSpeed form, equals the gradient that one process would compute on the whole batch, for the encoders and
    for `logit_scale` alike. Each rank computes its rows against all columns, for both directions at once: 4u/W
    FLOP of u = 2 N^2 D, vectors of N float64, and either one all-gather of `b` in its own dtype and one
    reduce-scatter of its gradient in float32, or a ring of transfers that hide behind the computation.

    Args:
        a: features `[m, D]` of this rank's rows, float32, float16, bfloat16 or float64. Ranks may have different
            numbers of rows, or none.
        b: features `[n, D]` of their partners, same dtype and device; n = m but for `labels`. The global batch is
            the ranks' rows in the order of the ranks.
        logit_scale: the multiplier itself, the same on every rank: a finite float or a tensor of one element.
        exclude: int64 `[m]`, the column of this rank's own `b` that a row does not see, counted from 0 on every rank;
            none where it is outside 0 to n - 1. NT-Xent of two views on any number of ranks is
            `a = cat([x, y])`, `b = cat([y, x])` with the row's own features excluded.
        symmetric: False leaves the columns' half out.
        labels: int64 `[m]` and `[n]`: equal labels are positives, on whichever ranks they are.
        negatives: features `[K, D]`, constants, the same queue on every rank: appended to the columns once.
        teacher: momentum features `[m, D]` and `[n, D]` of the same rows, constants, mixed in by `alpha`.
        alpha: from 0 to 1, above 0 only with a teacher.
        label_smoothing: from 0 to 1.
        normalized: the claim of unit norm, see `mmkernels.contrastive_stats`.
        group: the data-parallel process group; None = the default one, or one process where none is set up.
        gather_limit_bytes: above so many bytes of gathered `b` and teacher the ring is taken, in which no rank
            holds more than two ranks' shares of them at a time.

    Returns:
        The loss, a scalar, float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype, device, index, scale or combination of arguments on any rank, or ranks
            that differ in width, dtype or settings: on every rank.

    Reference: `mmkernels.contrastive_loss_ref` on the concatenated ranks. Papers: CLIP (arXiv:2103.00020), Inf-CL
    (arXiv:2410.17243).
    """
    options = Options(symmetric, alpha, label_smoothing, normalized)
    if world_size_of(group) == 1:
        given = {"exclude": exclude, "labels": labels, "negatives": negatives, "teacher": teacher}
        return contrastive_loss(a, b, logit_scale, **given, **asdict(options))

    def check() -> tuple[_Inputs, Header]:
        inputs = _checked(a, b, logit_scale, labels, negatives, teacher, options)
        if exclude is not None:
            check_unseen(a, exclude, None, labels, options)
        inputs = inputs._replace(exclude=exclude)
        given = {
            "exclude": "none" if exclude is None else "given",
            "teacher": "none" if teacher is None else "given",
            "negatives": "none" if negatives is None else f"{len(negatives)} rows",
        }
        more = given | asdict(options)
        return inputs, header(OP, ("a", "b", "logit_scale"), inputs[:3], labels, gather_limit_bytes, **more)

    inputs, layout = agree(OP, group, a.device, check)
    with torch.autocast(a.device.type, enabled=False):
        match, columns = _columns(inputs, layout, options, gather_limit_bytes)
        *stats, target = _GlobalStats.apply(inputs.a, inputs.b, inputs.scale, columns)  # pyright: ignore[reportGeneralTypeIssues]
        means = _linear_means(inputs, layout, match, target, options)
        rows, cols = pair_losses(ContrastiveStats(*stats), match, means, options)
        loss = reduce(rows, match.num_rows, "mean")
        if cols is not None:
            loss = (loss + reduce(cols, match.num_cols, "mean")) / 2
        return global_mean(loss, group).to(accumulator(inputs.a.dtype))


def _checked(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    labels: tuple[Tensor, Tensor] | None,
    negatives: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    options: Options,
) -> _Inputs:
    a, b, scale, teacher, negatives = checked_inputs(a, b, logit_scale, None, labels, negatives, teacher, options)
    a, b, scale = a.contiguous(), b.contiguous(), scale.reshape(()).double()
    broken = None
    if options.normalized:
        broken = broken_claim(ContrastiveProblem(a, b, scale, None, *(teacher or (None, None)), False))
        if negatives is not None:
            of_negatives = broken_claim(ContrastiveProblem(negatives, negatives, scale, None, None, None, False))
            broken = None if broken is None or of_negatives is None else broken | of_negatives
    return _Inputs(a, b, scale, labels, teacher, negatives, broken, None)


def _columns(inputs: _Inputs, layout: Layout, options: Options, gather_limit_bytes: int) -> "tuple[Match, _Columns]":
    """Each row's positives among all columns, and what its statistics are made from."""
    labels, weights = None, None
    if inputs.labels is None:
        own = layout.rows_of(layout.rank)
        first = torch.arange(own.start, own.stop, device=inputs.a.device)
        match = Match(first, None, None, None, sum(layout.rows), sum(layout.rows))
    else:
        all_rows = gather_rows(inputs.labels[0], layout.rows, layout.group)
        all_cols = gather_rows(inputs.labels[1], layout.cols, layout.group)
        first, cols = first_match(inputs.labels[0], all_cols)
        rows = first_match(inputs.labels[0], all_rows)[1]
        num_rows, num_cols = ((first_match(x, y)[1] > 0).sum() for x, y in ((all_rows, all_cols), (all_cols, all_rows)))
        labels = (inputs.labels[0], all_cols)
        match = Match(first, labels, cols, rows, num_rows, num_cols)
        place, count = first_match(all_cols, all_cols)
        is_first = place == torch.arange(len(place), device=place.device)
        weights = (1 / count.double() - is_first.double()).to(accumulator(inputs.a.dtype))
    broken = inputs.broken
    if broken is not None:
        broken = broken.float()
        dist.all_reduce(broken, op=dist.ReduceOp.MAX, group=layout.group)
        broken = broken > 0
    teacher_a, *teacher_b = inputs.teacher or (None,)
    shards = shards_of(layout, [inputs.b, *teacher_b], gather_limit_bytes)
    exclude = inputs.exclude
    if exclude is not None:
        own = layout.cols_of(layout.rank)
        is_there = (exclude >= 0) & (exclude < own.stop - own.start)
        exclude = torch.where(is_there, exclude + own.start, -1)
    of_rows = first, labels, weights, inputs.negatives, teacher_a
    return match, _Columns(layout, shards, *of_rows, options.symmetric, broken, exclude)


def _linear_means(inputs: _Inputs, layout: Layout, match: Match, target: Tensor, options: Options) -> LinearMeans:
    """What `mmkernels.contrastive` takes from means of features, these over all ranks; float64."""
    dtype = accumulator(inputs.a.dtype)
    a, b, scale, group = inputs.a.to(dtype), inputs.b.to(dtype), inputs.scale, layout.group
    of_positives = row = col = None
    if match.labels is not None:
        of_positives = scale * (a * target).sum(1).double()
    if options.label_smoothing > 0:
        total, count = all_sum(b.sum(0), group), sum(layout.cols)
        if inputs.negatives is not None:
            total, count = total + inputs.negatives.to(dtype).sum(0), count + len(inputs.negatives)
        row = scale * (a @ (total / max(count, 1))).double()
        if options.symmetric:
            a_mean = all_sum(a.sum(0), group) / max(sum(layout.rows), 1)
            own = layout.cols_of(layout.rank)
            of_cols = all_sum(F.pad(b @ a_mean, (own.start, sum(layout.cols) - own.stop)), group)
            col = scale * match.pool(of_cols).double()
    return LinearMeans(of_positives, row, col)


@dataclass(frozen=True)
class _Columns:
    """What this rank's rows are held against."""

    layout: Layout
    shards: Shards
    positives: Tensor  # int64 [m], the global column of a row's first positive, -1 if none
    labels: tuple[Tensor, Tensor] | None  # of this rank's rows [m] and of all columns [N]
    weights: Tensor | None  # [N]; times these, the sum of b over a row's positives is their mean less the first one
    negatives: Tensor | None
    teacher_a: Tensor | None
    symmetric: bool
    broken: Tensor | None  # bool [], on a GPU, whether the claim of unit norms is broken
    exclude: Tensor | None  # int64 [m], the global column that a row does not see, -1 if none

    def blocks(self, a: Tensor, scale: Tensor) -> Iterator[tuple[slice | None, ContrastiveProblem]]:
        """Which columns of the batch, and the rows against them; the negatives, which are none, last."""
        for cols, (b, *of_teacher) in self.shards.blocks():
            place = in_block(self.positives, cols, len(b))
            teacher_b = of_teacher[0] if of_teacher else None
            exclude = None if self.exclude is None else in_block(self.exclude, cols, len(b))
            yield (
                cols,
                ContrastiveProblem(a, b, scale, place, self.teacher_a, teacher_b, self.symmetric, exclude=exclude),
            )
        if self.negatives is not None:
            none = torch.full_like(self.positives, -1)
            teacher_b = None if self.teacher_a is None else self.negatives
            yield None, ContrastiveProblem(a, self.negatives, scale, none, self.teacher_a, teacher_b, False)


class _GlobalStats(torch.autograd.Function):
    """`ContrastiveStats` in float64, of this rank's rows against all columns (and the negatives) and of all columns
    against all rows, the same on every rank; and for each row the mean of its positives less the first, `[m, D]`, if
    labelled. The backward computes each block again from the log-sum-exps of the whole."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor, columns: _Columns):
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
            stats = ContrastiveStats(*(x.double() for x in contrastive_block(problem)))
            parts.append(stats)
            centers.append(mean_cosine(problem))
            if cols is None:
                continue
            positive += stats.positive + stats.positive_rest
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
        crosses = of_rows.cross, of_cols.cross
        # nothing was rounded from the positives: float64
        stats = ContrastiveStats(*lse, positive, *crosses, *rest, *of_teacher, torch.zeros_like(positive))
        stats = poisoned(stats, columns.broken)
        ctx.columns, ctx.parts, ctx.centers = columns, parts, centers
        ctx.save_for_backward(a, scale, *stats)
        ctx.mark_non_differentiable(*stats[5:])
        return *stats, target

    @staticmethod
    @first_order(OP, OVER_RANKS)
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
                    of_positives = label_sums(grads[-1], columns.labels[0], columns.labels[1][cols])
                    db += of_positives * columns.weights[cols, None]
                columns.shards.add_grad(db)
        return (
            da.to(a.dtype) if needs[0] else None,
            columns.shards.own_grad().to(a.dtype) if needs[1] else None,
            ds.to(scale.dtype) if needs[2] else None,
            None,
        )


def _excess(part: ContrastiveStats, whole: ContrastiveStats, grads: Sequence[Tensor]) -> Tensor:
    d_row, d_col, _, d_row_cross, d_col_cross = grads
    return excess(
        (d_row, part.row_lse + part.row_rest, whole.row_lse + whole.row_rest),
        (d_col, part.col_lse + part.col_rest, whole.col_lse + whole.col_rest),
        (d_row_cross, part.teacher_row_lse, whole.teacher_row_lse),
        (d_col_cross, part.teacher_col_lse, whole.teacher_col_lse),
    )
