"""The image-text contrastive loss of token features over the global batch, exact on any number of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.losses.ranks import Header, Layout, agree, gather_rows, global_mean, wanted_gradients, world_size_of
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
        b: features `[n, D]` of their partners, same dtype and device; n = m but for `labels`.
        logit_scale: the multiplier itself, the same on every rank: a finite float or a tensor of one element.
        symmetric: False leaves the columns' half out.
        labels: int64 `[m]` and `[n]`: equal labels are positives, on whichever ranks they are.
        mask: bool `[m, Q]`, True where a token counts.
        label_smoothing: from 0 to 1.
        group: the data-parallel process group; None = the default one, or one process where none is set up.
        gather_limit_bytes: above so many bytes of gathered `b` the features travel around a ring.

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
        require(OP, gather_limit_bytes >= 0, "gather_limit_bytes must be at least 0, got {}", gather_limit_bytes)
        require(OP, 0 <= label_smoothing <= 1, "label_smoothing must be from 0 to 1, got {}", label_smoothing)
        _check_one_side(b)
        inputs = token_operands(tokens, b, logit_scale)
        check_token_masks(tokens, b, masks)
        if check_token_labels(tokens, b, labels) is None:
            sizes = len(tokens), len(b)
            require(OP, sizes[0] == sizes[1], "b must have {} rows without labels, got {}", *sizes)
        same = {
            "Q": tokens.shape[1],
            "D": tokens.shape[2],
            "dtype": str(inputs[0].dtype),
            "labels": "none" if labels is None else "given",
            "gather_limit_bytes": gather_limit_bytes,
            "requires_grad": wanted_gradients(**dict(zip(("tokens", "b", "logit_scale"), inputs))),
        }
        return inputs, Header(len(tokens), len(b), same | options)

    (tokens, b, scale), layout = agree(OP, group, tokens.device, check)
    with torch.autocast(tokens.device.type, enabled=False):
        all_labels = None
        if labels is not None:
            counts = (layout.rows, layout.cols)
            all_labels = tuple(gather_rows(x, n, group) for x, n in zip(labels, counts, strict=True))
        own = layout.rows_of(layout.rank)
        columns = TokenColumns(
            layout,
            shards_of(layout, [b.contiguous()], gather_limit_bytes),
            torch.arange(own.start, own.stop, device=b.device) if labels is None else None,
            None if labels is None or all_labels is None else (labels[0], all_labels[1]),
            mask,
            label_smoothing > 0,
        )
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
