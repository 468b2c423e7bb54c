"""InfoNCE and what the field has made of it: vector arithmetic on `contrastive_stats`."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._autograd import is_transforming, reverse_only
from mmkernels._checks import accumulator, check_index, require
from mmkernels.contrastive import eager
from mmkernels.contrastive.labels import first_match, label_sums
from mmkernels.contrastive.op import (
    broken_claim,
    check_exclude,
    check_features,
    check_positives,
    contrastive_pairs,
    contrastive_stats,
    operands,
    pair_losses_are_fused,
)
from mmkernels.contrastive.problem import ContrastiveStats, Problem

REDUCTIONS = ("none", "mean", "sum")


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    symmetric: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    normalized: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of `S = logit_scale * a [b; negatives]^T`: with positive p of row i, the mean over i of
    `(row_lse_i + col_lse_p) / 2 - S[i, p]`, and its generalisations; S is never stored.

    Args:
        a: features `[M, D]`, float32, float16, bfloat16 or float64, any strides; unit norm is not required.
        b: features `[N, D]`, the dtype and device of `a`; M = N unless `positives` or `labels` are given.
        logit_scale: the multiplier itself (already exponentiated): a finite float, or a tensor of one
            element, whose gradient comes back in its shape and dtype.
        positives: int64 `[M]`, the column of each row's positive; None = the diagonal. Columns that are
            nobody's positive have no loss of their own.
        exclude: int64 `[M]`, the column of b that a row does not see, nor that column the row: as if the logit were
            -inf, a gradient of exactly zero; none where it is outside 0 to N - 1. NT-Xent (SimCLR, arXiv:2002.05709) is
            features against themselves, each row's own index excluded. It must be no positive of the row: on a GPU,
            where that is not read, the loss is then of no meaning. Not with label smoothing.
        symmetric: False leaves the columns' half out: `row_lse_i - S[i, p]`, as MoCo (arXiv:1911.05722).
        labels: int64 `[M]` and `[N]`, in place of `positives`: equal labels are positives and share the
            target alike (UniCL, arXiv:2204.03610; several captions an image). The loss is the mean over rows,
            and the mean over columns, that have a partner; one without adds nothing.
        negatives: features `[K, D]`, constants, appended to the columns of every row (the queue of MoCo and
            ALBEF); the columns' half does not see them.
        teacher: momentum features `[M, D]` and `[N, D]`, constants. The targets become `alpha` times the
            teacher's softmax (over the negatives too) plus `1 - alpha` times the others (ALBEF,
            arXiv:2107.07651).
        alpha: from 0 to 1, above 0 only with a teacher.
        label_smoothing: from 0 to 1, of the targets that are not the teacher's: uniform over all columns of
            a row (over all rows of a column), as in torch.nn.functional.cross_entropy.
        normalized: see `contrastive_stats`.
        reduction: "mean", "sum", or "none" for the loss of each row with its positive, `[M]`; with labels and
            both directions there is no such pair, and "none" is refused.

    Returns:
        The loss, a scalar or `[M]`: float32, accumulated in float32 (float64 for float64). A mean of nothing
        is 0.

    Raises:
        ValueError: a wrong shape, dtype, device, index, scale or combination of arguments.

    Reference: `contrastive_loss_ref`. Paper: arXiv:2103.00020.
    """
    options = Options(symmetric, alpha, label_smoothing, normalized, reduction)
    a, b, scale, teacher, negatives = checked_inputs(a, b, logit_scale, positives, labels, negatives, teacher, options)
    if exclude is not None:
        check_unseen(a, exclude, positives, labels, options)
    is_of_pairs = positives is labels is negatives is exclude is None
    form = eager.form_of(
        a,
        b,
        negatives,
        normalized=normalized,
        is_plain=options in PLAIN and is_of_pairs,
        is_of_pairs=options.has_hard_targets and is_of_pairs,
    )
    if form is not None:
        broken = None
        if normalized and (a.is_cuda or not is_transforming()):  # there rows may have no values yet
            broken = broken_claim(Problem(a, b, scale, None, *(teacher or (None, None)), symmetric))
        with torch.autocast(a.device.type, enabled=False):
            if form == "stored":
                return eager.StoredLoss.apply(a, b, scale)  # pyright: ignore[reportReturnType]
            loss = eager.contrastive_loss_eager(
                a,
                b,
                scale,
                positives=positives,
                exclude=exclude,
                labels=labels,
                negatives=negatives,
                teacher=teacher,
                **asdict(options),
            )
            return loss if broken is None else loss * torch.where(broken, torch.nan, 1.0)
    is_fused = options.has_hard_targets and is_of_pairs and pair_losses_are_fused(a)
    if is_fused and not is_transforming():
        reverse_only("contrastive_loss", "mmkernels.contrastive_loss_ref", a=a, b=b, logit_scale=scale)
        losses, _ = contrastive_pairs(a, b, scale, symmetric, normalized)
        return losses.mean() if reduction == "mean" else reduce(losses, len(a), reduction)
    # the scale's gradient is a sum of parts that cancel
    scale = scale.reshape(()).double()
    match = match_positives(a, b, positives, labels)
    kwargs = {"teacher": teacher, "normalized": normalized}
    stats = contrastive_stats(a, b, scale, positives=match.first, exclude=exclude, symmetric=symmetric, **kwargs)
    if negatives is not None:
        kwargs["teacher"] = None if teacher is None else (teacher[0], negatives)
        stats = with_negatives(stats, contrastive_stats(a, negatives, scale, symmetric=False, **kwargs))
    with torch.autocast(a.device.type, enabled=False):
        means = linear_means(a, b, scale, match, options, negatives)
        rows, cols = pair_losses(stats, match, means, options)
        if cols is None:
            return reduce(rows, match.num_rows, reduction)
        if labels is None:
            return reduce((rows + cols) / 2, match.num_rows, reduction)
        return (reduce(rows, match.num_rows, reduction) + reduce(cols, match.num_cols, reduction)) / 2


@dataclass(frozen=True)
class Options:
    """The arguments of `contrastive_loss` that are not tensors."""

    symmetric: bool = True
    alpha: float = 0.0
    label_smoothing: float = 0.0
    normalized: bool = False
    reduction: str = "mean"

    @property
    def has_hard_targets(self) -> bool:
        return self.alpha == self.label_smoothing == 0

    def check(self, has_labels: bool, has_teacher: bool) -> None:
        op, eps = "contrastive", self.label_smoothing
        require(op, self.reduction in REDUCTIONS, "reduction must be one of {}, got {}", REDUCTIONS, self.reduction)
        require(op, 0 <= self.alpha <= 1, "alpha must be from 0 to 1, got {}", self.alpha)
        require(op, 0 <= eps <= 1, "label_smoothing must be from 0 to 1, got {}", eps)
        require(op, has_teacher or self.alpha == 0, "teacher must be given with alpha, got alpha={}", self.alpha)
        require(op, not has_teacher or self.alpha > 0, "alpha must be above 0 with a teacher, got {}", self.alpha)
        require(
            op,
            not (has_labels and self.symmetric and self.reduction == "none"),
            "reduction must be 'mean' or 'sum' with labels and symmetric=True, got {!r}",
            self.reduction,
        )


PLAIN = (Options(), Options(normalized=True))


class Inputs(NamedTuple):
    """Features of one dtype, and the scale as a tensor; teacher and negatives detached."""

    a: Tensor  # [M, D]
    b: Tensor  # [N, D]
    scale: Tensor  # [] or [1]
    teacher: tuple[Tensor, Tensor] | None
    negatives: Tensor | None


def checked_inputs(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    positives: Tensor | None,
    labels: tuple[Tensor, Tensor] | None,
    negatives: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    options: Options,
) -> Inputs:
    """The arguments of `contrastive_loss`, checked, and cast for autocast."""
    a, b, scale, teacher = operands(a, b, logit_scale, teacher)
    options.check(labels is not None, teacher is not None)
    if negatives is not None:
        check_features("negatives", negatives, "K", a)
        # a queue that is still empty is none
        negatives = negatives.detach().to(a.dtype) if len(negatives) else None
    _check_pairing(a, b, positives, labels)
    return Inputs(a, b, scale, teacher, negatives)


def check_unseen(
    a: Tensor, exclude: Tensor, positives: Tensor | None, labels: tuple[Tensor, Tensor] | None, options: Options
) -> None:
    """What `check_exclude` holds, of positives by label and on the diagonal too."""
    eps = options.label_smoothing
    require("contrastive", eps == 0, "label_smoothing must be 0 with exclude, got {}", eps)
    if labels is None:
        check_exclude(a, exclude, torch.arange(len(a), device=a.device) if positives is None else positives)
        return
    check_exclude(a, exclude, None)
    if exclude.is_cuda or torch.compiler.is_compiling() or not len(labels[1]):
        return
    is_there = (exclude >= 0) & (exclude < len(labels[1]))
    partner = labels[1][exclude.clamp(0, len(labels[1]) - 1)] == labels[0]
    check_exclude(a, exclude, exclude.where(is_there & partner, -1))


class Match(NamedTuple):
    """Each row's positives among the columns.

    With labels: how many columns and how many rows share the row's label, and both sets of labels; None
    where each row has one positive. `num_rows`, `num_cols`: how many rows and columns have a partner.
    """

    first: Tensor  # int64 [M], one positive of each row, -1 if none
    labels: tuple[Tensor, Tensor] | None
    cols: Tensor | None  # int64 [M]
    rows: Tensor | None  # int64 [M]
    num_rows: Tensor | int
    num_cols: Tensor | int

    def pool(self, x: Tensor) -> Tensor:
        """The mean of `x` `[N, ...]` over each row's positives, `[M, ...]`; of none, anything finite."""
        if self.labels is None or self.cols is None:
            return x[self.first]
        sums = label_sums(x.reshape(len(x), -1), self.labels[1], self.labels[0])
        return (sums / self.cols.clamp(min=1)[:, None]).reshape(-1, *x.shape[1:])


def match_positives(a: Tensor, b: Tensor, positives: Tensor | None, labels: tuple[Tensor, Tensor] | None) -> Match:
    """The positives of the rows of `a`: by index, by label, or on the diagonal."""
    if labels is None:
        first = torch.arange(len(a), device=a.device) if positives is None else positives
        return Match(first, None, None, None, len(a), len(a))
    first, cols = first_match(labels[0], labels[1])
    rows = first_match(labels[0], labels[0])[1]
    num_cols = (first_match(labels[1], labels[0])[1] > 0).sum()
    return Match(first, labels, cols, rows, (cols > 0).sum(), num_cols)


class LinearMeans(NamedTuple):
    """Means of the logits of each row that are products with a mean feature, `[M]` each; None if not wanted."""

    positives: Tensor | None  # over the row's positives, beyond the first one
    row: Tensor | None  # over all its columns
    col: Tensor | None  # over all rows and the row's positives


def linear_means(
    a: Tensor, b: Tensor, scale: Tensor, match: Match, options: Options, negatives: Tensor | None = None
) -> LinearMeans:
    """The means that labels and smoothing need."""
    if match.labels is None and options.label_smoothing == 0:
        return LinearMeans(None, None, None)
    a, b = a.to(accumulator(a.dtype)), b.to(accumulator(b.dtype))
    scale = scale.reshape(()).to(a.dtype)
    of_positives = row = col = None
    if match.labels is not None:
        first = b[match.first.clamp(min=0)] if len(b) else b.new_zeros(a.shape)
        of_positives = scale * (a * (match.pool(b) - first)).sum(1)
    if options.label_smoothing > 0:
        columns = b if negatives is None else torch.cat([b, negatives.to(b.dtype)])
        row = scale * (a @ (columns.sum(0) / max(len(columns), 1)))
        if options.symmetric:
            col = scale * match.pool(b @ (a.sum(0) / max(len(a), 1)))
    return LinearMeans(of_positives, row, col)


def with_negatives(stats: ContrastiveStats, of_negatives: ContrastiveStats) -> ContrastiveStats:
    """The row statistics over the batch's columns and the negatives together.

    The log-sum-exps are added relative to the positive, so that the sum is exact where the loss is small.
    """
    positive = stats.positive
    over = torch.logaddexp(
        (stats.row_lse - positive) + stats.row_rest, (of_negatives.row_lse - positive) + of_negatives.row_rest
    )
    row_cross = stats.row_cross
    if len(row_cross):
        share = torch.sigmoid(of_negatives.teacher_row_lse - stats.teacher_row_lse)
        row_cross = torch.lerp(row_cross, of_negatives.row_cross, share)
    return stats._replace(row_lse=over + positive, row_rest=over - ((over + positive) - positive), row_cross=row_cross)


def pair_losses(
    stats: ContrastiveStats, match: Match, means: LinearMeans, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropies `[M]` of each row, and of the columns that are its positives: their mean, in such a
    weight that the sum over rows is the sum over columns. Zero for a row without a positive."""
    positive = stats.positive

    def beyond_positive(mean: Tensor | None, cross: Tensor) -> Tensor | float:
        """The expected logit under the target, less the first positive's."""
        target = 0.0 if means.positives is None else means.positives
        if mean is not None:
            target = torch.lerp(mean - positive, torch.zeros_like(positive) + target, 1 - options.label_smoothing)
        if len(cross):
            target = (1 - options.alpha) * target + options.alpha * (cross - positive)
        return target

    # the rests keep a small loss exact where the log-sum-exps are large
    rows = (stats.row_lse - positive) + (stats.row_rest - stats.positive_rest)
    rows = rows - beyond_positive(means.row, stats.row_cross)
    cols = None
    if options.symmetric:
        cols = (match.pool(stats.col_lse) - positive) + (match.pool(stats.col_rest) - stats.positive_rest)
        cross = match.pool(stats.col_cross) if len(stats.col_cross) else stats.col_cross
        cols = cols - beyond_positive(means.col, cross)
    if match.cols is None or match.rows is None:
        return rows, cols
    counted = match.cols > 0
    rows = torch.where(counted, rows, 0.0)
    weight = match.cols.to(rows.dtype) / match.rows
    return rows, None if cols is None else torch.where(counted, cols * weight, 0.0)


def reduce(losses: Tensor, count: Tensor | int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _check_pairing(a: Tensor, b: Tensor, positives: Tensor | None, labels: tuple[Tensor, Tensor] | None) -> None:
    if labels is not None:
        require("contrastive", positives is None, "positives must be None where labels are given, got {}", "both")
        for name, x, like in (("labels[0]", labels[0], a), ("labels[1]", labels[1], b)):
            check_index("contrastive", name, x, like.shape[0], "a", a)
    elif positives is not None:
        check_positives(a, b, positives, 0)
    else:
        require(
            "contrastive", a.shape == b.shape, "b must have the shape of a, {}, got {}", list(a.shape), list(b.shape)
        )
