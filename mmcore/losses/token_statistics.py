"""The token-contrastive statistics of the global batch, as `mmcore.losses.statistics` has the contrastive ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.losses.ranks import Group, Layout
from mmcore.losses.shards import Shards
from mmcore.losses.softmax import Softmax, excess, merged, own_excess, rounded
from mmcore.ops import TokenContrastiveStats, TokenProblem, accumulator, token_mean_cosine

COLUMN_FIELDS = ("col_lse", "col_total", "col_matched", "col_rest")
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
            place = None
            if self.positives is not None:
                place = self.positives - cols.start
                place = torch.where((place >= 0) & (place < len(b)), place, -1)
            of_cols = None if col_labels is None else col_labels[cols]
            yield (
                cols,
                TokenProblem(tokens, b, scale, place, row_labels, of_cols, self.mask, None, self.with_totals),
            )


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
            fields = torch.ops.mmkernels.token_contrastive_fwd(*_operands(problem))
            parts.append(TokenContrastiveStats(*(x.double() for x in fields)))
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
        stats = TokenContrastiveStats(
            row_lse=of_rows.lse,
            col_lse=whole_cols.lse,
            col_total=col_total,
            col_matched=col_matched,
            row_rest=of_rows.rest,
            col_rest=whole_cols.rest,
            **sums,
        )
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
        d_stats, center = _reduced(
            grads[:NUM_DIFFERENTIABLE], torch.stack(ctx.centers).mean(), columns.layout.group
        )
        row_lse, row_rest = rounded(stats.row_lse, stats.row_rest, dtype)
        col_lse, col_rest = rounded(stats.col_lse, stats.col_rest, dtype)
        in_dtype = TokenContrastiveStats(*(x.to(dtype) for x in stats))._replace(
            row_lse=row_lse, col_lse=col_lse, row_rest=row_rest, col_rest=col_rest
        )
        dtokens = torch.zeros_like(tokens, dtype=dtype)
        ds = center * own_excess(grads[:1], grads[1:2], d_stats[1:2], len(ctx.parts))
        for (cols, problem), part, part_center in zip(
            columns.blocks(tokens, scale), ctx.parts, ctx.centers, strict=True
        ):
            of_block = [x.to(dtype) for x in _at_columns(d_stats, cols)]
            part_grads = torch.ops.mmkernels.token_contrastive_bwd(
                *_operands(problem), _at_columns(in_dtype, cols), of_block, needs
            )
            if needs[0]:
                dtokens += part_grads[0]
            if needs[1]:
                columns.shards.add_grad(part_grads[1].to(dtype))
            if needs[2]:
                whole = TokenContrastiveStats(*_at_columns(stats, cols))
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


def _operands(problem: TokenProblem) -> tuple[Tensor | bool | None, ...]:
    p = problem
    labels = (p.row_labels, p.col_labels)
    return p.tokens, p.b, p.scale, p.positives, *labels, p.tokens_mask, p.b_mask, p.with_totals


def _at_columns(fields: Sequence[Tensor], cols: slice) -> list[Tensor]:
    """Statistics, or their gradients, with those of columns cut to a block's."""
    names = TokenContrastiveStats._fields
    return [x[cols] if name in COLUMN_FIELDS else x for name, x in zip(names, fields)]


def _reduced(grads: Sequence[Tensor], center: Tensor, group: Group) -> tuple[list[Tensor], Tensor]:
    """The gradients with those of the columns' statistics summed over the ranks; the mean of their centers."""
    names = TokenContrastiveStats._fields
    of_cols = [i for i, _ in enumerate(grads) if names[i] in COLUMN_FIELDS]
    packed = torch.cat([*(grads[i] for i in of_cols), center.double().reshape(1)])
    dist.all_reduce(packed, group=group)
    *reduced, centers = packed.split([*(len(grads[i]) for i in of_cols), 1])
    whole = list(grads)
    for i, d in zip(of_cols, reduced, strict=True):
        whole[i] = d
    return whole, centers[0] / dist.get_world_size(group)
