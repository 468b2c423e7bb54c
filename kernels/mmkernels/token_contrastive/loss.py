"""The image-text contrastive loss of token features: vector arithmetic on `token_contrastive_stats`."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._checks import require
from mmkernels.token_contrastive import eager
from mmkernels.token_contrastive.op import (
    OP,
    Labels,
    Masks,
    check_labels,
    check_masks,
    check_positives,
    operands,
    token_contrastive_stats,
)
from mmkernels.token_contrastive.problem import TokenContrastiveStats, label_counts

REDUCTIONS = ("none", "mean", "sum")


def token_contrastive_loss(
    tokens: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    symmetric: bool = True,
    labels: Labels | None = None,
    masks: Masks | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of `S_ij = logit_scale * max_q <tokens_iq, b_j>`: with positive p of row i, the mean over i of
    `(row_lse_i + col_lse_p) / 2 - S[i, p]`; S is never stored.

    With tokens on both sides, late interaction: see `token_contrastive_stats`.

    Args:
        tokens: features `[M, Q, D]`, float32, float16, bfloat16 or float64, any strides; unit norm is not
            required.
        b: features `[N, D]`, or `[N, T, D]` for late interaction, the dtype and device of `tokens`; M = N unless
            `positives` or `labels` are given.
        logit_scale: the multiplier itself (already exponentiated): a finite float, or a tensor of one element,
            whose gradient comes back in its shape and dtype.
        positives: int64 `[M]`, the column of each row's positive; None = the diagonal. Columns that are
            nobody's positive have no loss of their own.
        symmetric: False leaves the columns' half out: `row_lse_i - S[i, p]`.
        labels: int64 `[M]` and `[N]`, in place of `positives`: equal labels are positives and share the target
            alike (BLIP-2 with image ids; UniCL, arXiv:2204.03610). The loss is half the mean over rows, and
            half the mean over columns, that have a partner; one without adds nothing.
        masks: see `token_contrastive_stats`.
        label_smoothing: from 0 to 1: the targets' weight that is spread evenly over all columns of a row (over
            all rows of a column).
        reduction: "mean", "sum", or "none" for the loss of each row with its positive, `[M]`; with labels and
            both directions, of row i and column i, and M = N.

    Returns:
        The loss, a scalar or `[M]`: float32, accumulated in float32 (float64 for float64). A mean of nothing
        is 0.

    Raises:
        ValueError: a wrong shape, dtype, device, index, scale or combination of arguments.

    Reference: `token_contrastive_loss_ref`. Papers: arXiv:2301.12597, arXiv:2111.07783.
    """
    tokens, b, scale = operands(tokens, b, logit_scale)
    options = _Options(symmetric, label_smoothing, reduction)
    _check(tokens, b, positives, labels, options)
    check_masks(tokens, b, masks)
    is_plain = labels is None and masks is None and options == (True, 0.0, "mean")
    if is_plain and eager.is_stored(tokens, b, positives):
        return eager.StoredTokens.apply(tokens, b, scale)  # pyright: ignore[reportReturnType]
    if eager.is_faster(tokens, b):
        with torch.autocast(tokens.device.type, enabled=False):
            return eager.token_contrastive_loss_eager(
                tokens, b, scale, positives=positives, labels=labels, masks=masks, **options._asdict()
            )
    if positives is None and labels is None:
        positives = torch.arange(tokens.shape[0], device=tokens.device)
    stats = token_contrastive_stats(
        tokens, b, scale, positives=positives, labels=labels, masks=masks, with_totals=label_smoothing > 0
    )
    with torch.autocast(tokens.device.type, enabled=False):
        if positives is not None:
            return _of_pairs(stats, positives, options)
        assert labels is not None
        return _of_labels(stats, labels, options)


class _Options(NamedTuple):
    """The arguments of `token_contrastive_loss` that are not tensors."""

    symmetric: bool
    label_smoothing: float
    reduction: str


def _check(tokens: Tensor, b: Tensor, positives: Tensor | None, labels: Labels | None, options: _Options) -> None:
    smoothing, reduction = options.label_smoothing, options.reduction
    require(OP, reduction in REDUCTIONS, "reduction must be one of {}, got {!r}", REDUCTIONS, reduction)
    require(OP, 0 <= smoothing <= 1, "label_smoothing must be from 0 to 1, got {}", smoothing)
    num_rows, num_cols = tokens.shape[0], b.shape[0]
    square = num_rows == num_cols
    if positives is not None:
        require(OP, labels is None, "positives must be None with labels, got {}", "both")
        check_positives(tokens, b, positives, 0)
    elif labels is not None:
        check_labels(tokens, b, labels)
        one_by_one = options.symmetric and reduction == "none"
        sentence = "b must have M = {} rows with labels, symmetric and reduction='none', got {}"
        require(OP, square or not one_by_one, sentence, num_rows, num_cols)
    else:
        require(OP, square, "b must have M = {} rows without positives, got {}", num_rows, num_cols)


def _of_pairs(stats: TokenContrastiveStats, positives: Tensor, options: _Options) -> Tensor:
    """Of one positive to a row."""
    num_rows, num_cols = len(stats.row_lse), len(stats.col_lse)
    smoothing, losses = options.label_smoothing, (stats.row_lse, stats.row_rest)
    rows = cross_entropy(*losses, stats.positive, stats.row_total, num_cols, smoothing)
    if not options.symmetric:
        return _reduce(rows, num_rows, options.reduction)
    col_positive = stats.col_positive if len(stats.col_positive) else stats.positive
    col_total = stats.col_total[positives] if smoothing > 0 else stats.col_total
    losses = stats.col_lse[positives], stats.col_rest[positives]
    cols = cross_entropy(*losses, col_positive, col_total, num_rows, smoothing)
    return _reduce((rows + cols) / 2, num_rows, options.reduction)


def _of_labels(stats: TokenContrastiveStats, labels: Labels, options: _Options) -> Tensor:
    """Of positives that share their target."""
    num_rows, num_cols = len(stats.row_lse), len(stats.col_lse)
    row_count, col_count = label_counts(*labels), label_counts(*reversed(labels))
    target = stats.row_matched / row_count.clamp(min=1)
    smoothing, losses = options.label_smoothing, (stats.row_lse, stats.row_rest)
    rows = cross_entropy(*losses, target, stats.row_total, num_cols, smoothing).where(row_count > 0, 0)
    if not options.symmetric:
        return _reduce(rows, (row_count > 0).sum(), options.reduction)
    target = stats.col_matched / col_count.clamp(min=1)
    losses = stats.col_lse, stats.col_rest
    cols = cross_entropy(*losses, target, stats.col_total, num_rows, smoothing).where(col_count > 0, 0)
    if options.reduction == "none":
        return (rows + cols) / 2
    of_rows = _reduce(rows, (row_count > 0).sum(), options.reduction)
    return (of_rows + _reduce(cols, (col_count > 0).sum(), options.reduction)) / 2


def cross_entropy(lse: Tensor, rest: Tensor, target: Tensor, total: Tensor, size: int, smoothing: float) -> Tensor:
    """`lse` less the expected logit; `total / size` is the mean logit, not wanted without smoothing."""
    if smoothing > 0:
        target = torch.lerp(target, total / max(size, 1), smoothing)
    return (lse - target) + rest  # the rest keeps a small loss exact where the log-sum-exps are large


def _reduce(losses: Tensor, count: Tensor | int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
