"""The image-text contrastive loss of token features over the global batch, exact on any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcore.losses.ranks import OVER_RANKS, Header, Layout, agree, gather_rows, global_mean, header, world_size_of
from mmcore.losses.shards import GATHER_LIMIT_BYTES, Shards, shards_of
from mmcore.losses.softmax import Softmax, at_columns, excess, in_block, merged, own_excess, reduced, rounded
from mmkernels import token_contrastive_loss
from mmkernels.pieces import (
    TokenContrastiveStats,
    TokenProblem,
    accumulator,
    check_token_labels,
    check_token_masks,
    first_order,
    label_counts,
    require,
    token_block,
    token_block_grads,
    token_cross_entropy,
    token_mean_cosine,
    token_operands,
)

OP = "global_token_contrastive_loss"
COLUMN_FIELDS = ("col_lse", "col_total", "col_matched", "col_rest")
IS_OF_COLS = [name in COLUMN_FIELDS for name in TokenContrastiveStats._fields]
NUM_DIFFERENTIABLE = 8


def global_token_contrastive_loss(
    tokens: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    symmetric: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    gather_limit_bytes: int = GATHER_LIMIT_BYTES,
) -> Tensor:
    """`mmkernels.token_contrastive_loss` of the rows of all ranks: InfoNCE of the global batch's
    `S_ij = logit_scale * max_q <tokens_iq, b_j>` (BLIP-2's image-text contrastive loss), or, with tokens on both
    sides, of late interaction: `S_row_ij = logit_scale * mean_q max_t <tokens_iq, b_jt>` along rows, and along columns
    the same with the sides exchanged (FILIP's; ColBERT's and ColPali's with `symmetric=False`).

    Every rank gets the same value, and gradients whose *mean* over ranks is that of one process, as in
    `global_contrastive_loss`, whose other arguments, result and errors these are. The `b` travel, the tokens stay where
    they are.

    Args:
        tokens: features `[m, Q, D]` of this rank's rows, float32, float16, bfloat16 or float64. Ranks may have
            different numbers of rows, or none.
        b: features `[n, D]`, or `[n, T, D]` for late interaction, T and then Q as each rank pads its own.
        mask: bool `[m, Q]`, True where a token counts.
        b_mask: bool `[n, T]`, the same of `b`; on all ranks or on none.

    Reference: `mmkernels.token_contrastive_loss_ref` on the concatenated ranks. Papers: arXiv:2301.12597 (BLIP-2),
    arXiv:2111.07783 (FILIP).
    """
    options = {"symmetric": symmetric, "label_smoothing": label_smoothing}
    masks = None if mask is None and b_mask is None else (mask, b_mask)
    if world_size_of(group) == 1:
        return token_contrastive_loss(tokens, b, logit_scale, labels=labels, masks=masks, **options)

    def check() -> tuple[tuple[Tensor, Tensor, Tensor], Header]:
        require(OP, 0 <= label_smoothing <= 1, "label_smoothing must be from 0 to 1, got {}", label_smoothing)
        inputs = token_operands(tokens, b, logit_scale)
        check_token_masks(tokens, b, masks)
        if check_token_labels(tokens, b, labels) is None:
            sizes = len(tokens), len(b)
            require(OP, sizes[0] == sizes[1], "b must have {} rows without labels, got {}", *sizes)
        sides = {"b": f"[n, D] of Q = {tokens.shape[1]}" if b.ndim == 2 else "[n, T, D]"}
        more = sides | {"b_mask": "none" if b_mask is None else "given", **options}
        told = header(OP, ("tokens", "b", "logit_scale"), inputs, labels, gather_limit_bytes, **more)
        return inputs, told._replace(length=b.shape[1] if b.ndim == 3 else 0)

    (tokens, b, scale), layout = agree(OP, group, tokens.device, check)
    b, b_mask = _as_long(b, b_mask, layout)
    with torch.autocast(tokens.device.type, enabled=False):
        positives = all_labels = of_columns = None
        if labels is None:
            own = layout.rows_of(layout.rank)
            positives = torch.arange(own.start, own.stop, device=b.device)
        else:
            all_labels = gather_rows(labels[0], layout.rows, group), gather_rows(labels[1], layout.cols, group)
            of_columns = labels[0], all_labels[1]
        own_cols = [b.contiguous(), *([] if b_mask is None else [b_mask.to(torch.uint8)])]
        shards = shards_of(layout, own_cols, gather_limit_bytes)
        columns = _TokenColumns(layout, shards, positives, of_columns, mask, label_smoothing > 0)
        stats = _TokenStats.apply(tokens.contiguous(), b, scale.reshape(()).double(), columns)
        loss = _own_share(TokenContrastiveStats(*stats), layout, all_labels, symmetric, label_smoothing)  # pyright: ignore[reportGeneralTypeIssues]
        return global_mean(loss, group).to(accumulator(tokens.dtype))


def _as_long(b: Tensor, b_mask: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """`b` [n, T, D] and its mask padded to the longest rank's T; of one token a column as they are."""
    longest = max(layout.lengths)
    if min(layout.lengths) == longest:
        return b, b_mask
    if b_mask is None:
        raise ValueError(f"{OP}: b_mask must be given where ranks differ in T, got None and T = {layout.lengths}")
    missing = longest - b.shape[1]
    return F.pad(b, (0, 0, 0, missing)), F.pad(b_mask, (0, missing))


def _own_share(
    stats: TokenContrastiveStats, layout: Layout, labels: tuple[Tensor, ...] | None, symmetric: bool, smoothing: float
) -> Tensor:
    """The part of the global loss that this rank's rows, and its own columns, make."""
    own_rows, own_cols = layout.rows_of(layout.rank), layout.cols_of(layout.rank)
    num_rows, num_cols = sum(layout.rows), sum(layout.cols)
    of_pairs = stats.col_positive if len(stats.col_positive) else stats.positive  # another S of late interaction
    col_lse, col_rest, col_total, col_matched = (
        x[own_cols] for x in (stats.col_lse, stats.col_rest, stats.col_total, stats.col_matched)
    )
    if labels is None:
        rows = token_cross_entropy(stats.row_lse, stats.row_rest, stats.positive, stats.row_total, num_cols, smoothing)
        cols = token_cross_entropy(col_lse, col_rest, of_pairs, col_total, num_rows, smoothing)
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


@dataclass(frozen=True)
class _TokenColumns:
    """What this rank's rows are held against."""

    layout: Layout
    shards: Shards
    positives: Tensor | None  # int64 [m], the global column of each row's positive, None with labels
    labels: tuple[Tensor, Tensor] | None  # of this rank's rows [m] and of all columns [N]
    mask: Tensor | None  # of this rank's tokens, bool [m, Q]
    with_totals: bool

    def blocks(self, tokens: Tensor, scale: Tensor) -> Iterator[tuple[slice, TokenProblem]]:
        row_labels, col_labels = self.labels or (None, None)
        for cols, (b, *masks) in self.shards.blocks():
            b_mask = masks[0].bool() if masks else None
            place = None if self.positives is None else in_block(self.positives, cols, len(b))
            of_cols = None if col_labels is None else col_labels[cols]
            yield cols, TokenProblem(tokens, b, scale, place, row_labels, of_cols, self.mask, b_mask, self.with_totals)


class _TokenStats(torch.autograd.Function):
    """`TokenContrastiveStats` in float64, of this rank's rows against all columns and of all columns against all rows,
    the same on every rank."""

    @staticmethod
    def forward(ctx, tokens: Tensor, b: Tensor, scale: Tensor, columns: _TokenColumns):
        tokens, scale = tokens.detach(), scale.detach()
        parts: list[TokenContrastiveStats] = []
        places, centers = [], []
        for cols, problem in columns.blocks(tokens, scale):
            parts.append(TokenContrastiveStats(*(x.double() for x in token_block(problem))))
            places.append(cols.start)
            centers.append(token_mean_cosine(problem))
        none = tokens.new_zeros(len(parts), 0, dtype=torch.float64).unbind()
        of_rows = merged([Softmax(p.row_lse, p.row_rest, x, x) for p, x in zip(parts, none, strict=True)])
        in_order = [part for _, part in sorted(zip(places, parts, strict=True), key=lambda pair: pair[0])]
        of_cols = {name: torch.cat([getattr(part, name) for part in in_order]) for name in COLUMN_FIELDS}
        group = columns.layout.group
        whole_cols = merged([Softmax(of_cols["col_lse"], of_cols["col_rest"], none[0], none[0])], group, True)
        linear = torch.cat([of_cols["col_total"], of_cols["col_matched"]])
        dist.all_reduce(linear, group=group)
        col_total, col_matched = linear.split([len(of_cols["col_total"]), len(of_cols["col_matched"])])
        rows = ("positive", "col_positive", "row_total", "row_matched")
        sums = {name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in rows}
        sums |= {"col_total": col_total, "col_matched": col_matched}
        sums |= {"row_lse": of_rows.lse, "row_rest": of_rows.rest}
        stats = TokenContrastiveStats(col_lse=whole_cols.lse, col_rest=whole_cols.rest, **sums)
        ctx.columns, ctx.parts, ctx.centers = columns, parts, centers
        ctx.save_for_backward(tokens, scale, *stats)
        ctx.mark_non_differentiable(*stats[NUM_DIFFERENTIABLE:])
        return tuple(stats)

    @staticmethod
    @first_order(OP, OVER_RANKS)
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, scale, *saved = ctx.saved_tensors
        columns, stats, needs = ctx.columns, TokenContrastiveStats(*saved), list(ctx.needs_input_grad[:3])
        dtype = accumulator(tokens.dtype)
        d_stats, center = reduced(grads[:NUM_DIFFERENTIABLE], IS_OF_COLS, ctx.centers, columns.layout.group)
        in_dtype = rounded(stats, dtype)
        dtokens = torch.zeros_like(tokens, dtype=dtype)
        ds = center * own_excess(grads[:1], grads[1:2], d_stats[1:2], len(ctx.parts))
        for (cols, problem), part, part_center in zip(
            columns.blocks(tokens, scale), ctx.parts, ctx.centers, strict=True
        ):
            of_block = [x.to(dtype) for x in at_columns(d_stats, IS_OF_COLS, cols)]
            part_grads = token_block_grads(problem, at_columns(in_dtype, IS_OF_COLS, cols), of_block, needs)
            if needs[0]:
                dtokens += part_grads[0]
            if needs[1]:
                columns.shards.add_grad(part_grads[1].to(dtype))
            if needs[2]:
                whole = TokenContrastiveStats(*at_columns(stats, IS_OF_COLS, cols))
                ds += part_grads[2] + (part_center - center) * excess(
                    (of_block[0], part.row_lse + part.row_rest, whole.row_lse + whole.row_rest),
                    (of_block[1], part.col_lse + part.col_rest, whole.col_lse + whole.col_rest),
                )
        return (
            dtokens.to(tokens.dtype) if needs[0] else None,
            columns.shards.own_grad().to(tokens.dtype) if needs[1] else None,
            ds.to(scale.dtype) if needs[2] else None,
            None,
        )
