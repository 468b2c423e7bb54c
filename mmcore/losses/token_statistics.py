"""The token-contrastive statistics of the global batch, as `mmcore.losses.statistics` has the contrastive ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.losses.ranks import Layout
from mmcore.losses.shards import Shards
from mmcore.losses.softmax import Softmax, at_columns, excess, in_block, merged, own_excess, reduced, rounded
from mmkernels.pieces import (
    TokenContrastiveStats,
    TokenProblem,
    accumulator,
    token_block,
    token_block_grads,
    token_mean_cosine,
)

COLUMN_FIELDS = ("col_lse", "col_total", "col_matched", "col_rest")
IS_OF_COLS = [name in COLUMN_FIELDS for name in TokenContrastiveStats._fields]
NUM_DIFFERENTIABLE = 8


@dataclass(frozen=True)
class TokenColumns:
    """What this rank's rows are held against.

    `positives`: int64 `[m]`, the global column of each row's positive, None with labels. `labels`: of this rank's
    rows `[m]` and of all columns `[N]`. `masks`: of this rank's tokens, bool `[m, Q]`.
    """

    layout: Layout
    shards: Shards
    positives: Tensor | None
    labels: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    with_totals: bool

    def blocks(self, tokens: Tensor, scale: Tensor) -> Iterator[tuple[slice, TokenProblem]]:
        row_labels, col_labels = self.labels or (None, None)
        for cols, (b,) in self.shards.blocks():
            place = None if self.positives is None else in_block(self.positives, cols, len(b))
            of_cols = None if col_labels is None else col_labels[cols]
            yield cols, TokenProblem(tokens, b, scale, place, row_labels, of_cols, self.mask, None, self.with_totals)


class GlobalTokenStats(torch.autograd.Function):
    """`TokenContrastiveStats` in float64, of this rank's rows against all columns and of all columns against all
    rows. Every rank has the same statistics of the columns; their gradient is the sum of what the ranks' losses
    give."""

    @staticmethod
    def forward(ctx, tokens: Tensor, b: Tensor, scale: Tensor, columns: TokenColumns):
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
    @once_differentiable
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
