"""Softmaxes put together from parts, of blocks of columns and of ranks; float64, so that no small loss is lost in
the rounding of large log-sum-exps."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.losses.ranks import Group
from mmkernels.pieces import ContrastiveStats, TokenContrastiveStats, log_sum_exp

Stats = TypeVar("Stats", ContrastiveStats, TokenContrastiveStats)


class Softmax(NamedTuple):
    """Log-sum-exps of rows or of columns with what rounding took from them; a teacher's with its expectations."""

    lse: Tensor
    rest: Tensor
    teacher_lse: Tensor
    cross: Tensor


def merged(parts: list[Softmax], group: Group | None = None, over_ranks: bool = False) -> Softmax:
    """The softmax over all parts, which are parts of the same rows or columns; `over_ranks`, over theirs too."""
    lse, rest, teacher_lse, cross = (torch.stack(x) for x in zip(*parts, strict=True))  # [parts, n]
    logs = torch.cat([lse, teacher_lse], 1)
    top = logs.amax(0).clamp_(min=torch.finfo(logs.dtype).min)
    if over_ranks:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shares = torch.cat([lse - top[: lse.shape[1]] + rest, teacher_lse - top[lse.shape[1] :]], 1).exp_()
    of_teacher = shares[:, lse.shape[1] :]
    # nothing of an empty part, whose expectation is not a number
    crosses = torch.where(of_teacher > 0, of_teacher * cross, 0.0)
    sums = torch.cat([shares.sum(0), crosses.sum(0)])
    if over_ranks:
        dist.all_reduce(sums, group=group)
    total, teacher_total, cross_total = sums.split([lse.shape[1], *[teacher_lse.shape[1]] * 2])
    top, teacher_top = top.split([lse.shape[1], teacher_lse.shape[1]])
    lse, rest = log_sum_exp(top, total)
    return Softmax(lse, rest, teacher_top + teacher_total.log(), cross_total / teacher_total)


def rounded(stats: Stats, dtype: torch.dtype) -> Stats:
    """Statistics in `dtype`, the rests taking up what that loses."""
    found = {name: x.to(dtype) for name, x in stats._asdict().items()}
    for rest in found.keys() & {"row_rest", "col_rest", "positive_rest"}:
        of = getattr(stats, rest.replace("_rest", "" if rest == "positive_rest" else "_lse"))
        lost = (of - of.to(dtype)) + getattr(stats, rest)
        found[rest] = lost.nan_to_num(0.0, 0.0, 0.0).to(dtype)
    return type(stats)(**found)


def in_block(positives: Tensor, cols: slice, num_cols: int) -> Tensor:
    """Columns of the batch as columns of a block of `num_cols` from `cols.start` on, -1 for those of other blocks."""
    place = positives - cols.start
    return torch.where((place >= 0) & (place < num_cols), place, -1)


def at_columns(fields: Sequence[Tensor], is_of_cols: Sequence[bool], cols: slice | None) -> list[Tensor]:
    """Statistics, or their gradients, with those of columns cut to a block's; of None to none."""
    return [x[cols or slice(0)] if of_cols else x for x, of_cols in zip(fields, is_of_cols)]


def reduced(
    grads: Sequence[Tensor], is_of_cols: Sequence[bool], centers: Sequence[Tensor], group: Group
) -> tuple[list[Tensor], Tensor]:
    """The gradients with those of the columns' statistics summed over the ranks; the mean of all blocks' centers."""
    own = [d for d, of_cols in zip(grads, is_of_cols) if of_cols]
    packed = torch.cat([*own, torch.stack(list(centers)).mean().double().reshape(1)])
    dist.all_reduce(packed, group=group)
    *summed, center = packed.split([*map(len, own), 1])
    whole = iter(summed)
    all_grads = [next(whole) if of_cols else d for d, of_cols in zip(grads, is_of_cols)]
    return all_grads, center[0] / dist.get_world_size(group)


def excess(*of_lse: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What the sum of dL/dS over a block of `S` has beyond that of all gradients of log-sum-exps, float64.

    Each triple is such a gradient, with the log-sum-exps of the block alone and of the whole. An op's backward
    takes it that the probabilities in its block sum to one; those of the whole sum to exp(block - whole).
    """
    sums = []
    for d, of_block, of_whole in of_lse:
        # a row without columns has no gradient, and no share
        sums.append(torch.where(d != 0, d.double() * (of_block - of_whole).expm1(), 0.0).sum())
    return torch.stack(sums).sum()


def own_excess(
    of_rows: Sequence[Tensor], own_cols: Sequence[Tensor], all_cols: Sequence[Tensor], num_blocks: int
) -> Tensor:
    """The `excess` of all blocks of a rank: summed over the ranks, exactly, since all shares of a row and of a
    column sum to one. `own_cols` are the gradients of the columns before their sum over the ranks, `all_cols`."""
    rows, own, whole = (torch.stack([d.sum() for d in ds]).sum() for ds in (of_rows, own_cols, all_cols))
    return (1 - num_blocks) * rows + own - whole
