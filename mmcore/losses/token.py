"""The image-text contrastive loss of token features over the global batch, exact on any number of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.losses.ranks import Header, Layout, agree, gather_rows, global_mean, header, world_size_of
from mmcore.losses.shards import GATHER_LIMIT_BYTES, shards_of
from mmcore.losses.token_statistics import GlobalTokenStats, TokenColumns
from mmkernels import token_contrastive_loss
from mmkernels.pieces import (
    TokenContrastiveStats,
    accumulator,
    check_token_labels,
    check_token_masks,
    label_counts,
    require,
    token_cross_entropy,
    token_operands,
)

OP = "global_token_contrastive_loss"


def global_token_contrastive_loss(
    tokens: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    symmetric: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    gather_limit_bytes: int = GATHER_LIMIT_BYTES,
) -> Tensor:
    """`mmkernels.token_contrastive_loss` of the rows of all ranks: InfoNCE of the global batch's
    `S_ij = logit_scale * max_q <tokens_iq, b_j>` (BLIP-2's image-text contrastive loss).

    Every rank gets the same value, and gradients whose *mean* over ranks is that of one process, as in
    `global_contrastive_loss`. The `b` travel, the tokens stay where they are.

    Args:
        tokens: features `[m, Q, D]` of this rank's rows, float32, float16, bfloat16 or float64. Ranks may have
            different numbers of rows, or none.
        b, logit_scale, symmetric, labels, label_smoothing, group, gather_limit_bytes: as in
            `global_contrastive_loss`.
        mask: bool `[m, Q]`, True where a token counts.

    Returns:
        The loss, a scalar, float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype, device, scale or option on any rank, or ranks that differ in width, dtype
            or settings: on every rank.

    Reference: `mmkernels.token_contrastive_loss_ref` on the concatenated ranks. Paper: arXiv:2301.12597.
    """
    options = {"symmetric": symmetric, "label_smoothing": label_smoothing}
    masks = None if mask is None else (mask, None)
    if world_size_of(group) == 1:
        _check_one_side(b)
        return token_contrastive_loss(tokens, b, logit_scale, labels=labels, masks=masks, **options)

    def check() -> tuple[tuple[Tensor, Tensor, Tensor], Header]:
        require(OP, 0 <= label_smoothing <= 1, "label_smoothing must be from 0 to 1, got {}", label_smoothing)
        _check_one_side(b)
        inputs = token_operands(tokens, b, logit_scale)
        check_token_masks(tokens, b, masks)
        if check_token_labels(tokens, b, labels) is None:
            sizes = len(tokens), len(b)
            require(OP, sizes[0] == sizes[1], "b must have {} rows without labels, got {}", *sizes)
        by_name = dict(zip(("tokens", "b", "logit_scale"), inputs))
        return inputs, header(OP, by_name, labels, gather_limit_bytes, Q=tokens.shape[1], **options)

    (tokens, b, scale), layout = agree(OP, group, tokens.device, check)
    with torch.autocast(tokens.device.type, enabled=False):
        positives = all_labels = of_columns = None
        if labels is None:
            own = layout.rows_of(layout.rank)
            positives = torch.arange(own.start, own.stop, device=b.device)
        else:
            all_labels = gather_rows(labels[0], layout.rows, group), gather_rows(labels[1], layout.cols, group)
            of_columns = labels[0], all_labels[1]
        shards = shards_of(layout, [b.contiguous()], gather_limit_bytes)
        columns = TokenColumns(layout, shards, positives, of_columns, mask, label_smoothing > 0)
        stats = GlobalTokenStats.apply(tokens.contiguous(), b, scale.reshape(()).double(), columns)
        loss = _own_share(TokenContrastiveStats(*stats), layout, all_labels, symmetric, label_smoothing)  # pyright: ignore[reportGeneralTypeIssues]
        return global_mean(loss, group).to(accumulator(tokens.dtype))


def _check_one_side(b: Tensor) -> None:
    """Tokens on both sides, late interaction, have another S for the columns than for the rows."""
    require(OP, b.ndim == 2, "b must be [n, D], got shape {}", list(b.shape))


def _own_share(
    stats: TokenContrastiveStats, layout: Layout, labels: tuple[Tensor, ...] | None, symmetric: bool, smoothing: float
) -> Tensor:
    """The part of the global loss that this rank's rows, and its own columns, make."""
    own_rows, own_cols = layout.rows_of(layout.rank), layout.cols_of(layout.rank)
    num_rows, num_cols = sum(layout.rows), sum(layout.cols)
    col_lse, col_rest, col_total, col_matched = (
        x[own_cols] for x in (stats.col_lse, stats.col_rest, stats.col_total, stats.col_matched)
    )
    if labels is None:
        rows = token_cross_entropy(stats.row_lse, stats.row_rest, stats.positive, stats.row_total, num_cols, smoothing)
        cols = token_cross_entropy(col_lse, col_rest, stats.positive, col_total, num_rows, smoothing)
        losses = (rows + cols) / 2 if symmetric else rows
        return losses.sum() / max(num_rows, 1)
    row_counts, col_counts = label_counts(*labels), label_counts(labels[1], labels[0])
    row_count, col_count = row_counts[own_rows], col_counts[own_cols]
    row_target, col_target = stats.row_matched / row_count.clamp(min=1), col_matched / col_count.clamp(min=1)
    rows = token_cross_entropy(stats.row_lse, stats.row_rest, row_target, stats.row_total, num_cols, smoothing)
    rows = rows.where(row_count > 0, 0).sum() / (row_counts > 0).sum().clamp(min=1)
    if not symmetric:
        return rows
    cols = token_cross_entropy(col_lse, col_rest, col_target, col_total, num_rows, smoothing)
    return (rows + cols.where(col_count > 0, 0).sum() / (col_counts > 0).sum().clamp(min=1)) / 2
