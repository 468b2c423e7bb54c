"""The sigmoid loss over the global batch, exact in value and in gradient on any number of data-parallel ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.losses.ranks import OVER_RANKS, Header, agree, gather_rows, global_mean, header, world_size_of
from mmcore.losses.shards import GATHER_LIMIT_BYTES, Shards, shards_of
from mmkernels import sigmoid_loss
from mmkernels.pieces import accumulator, checked_sigmoid_operands, first_order, sigmoid_block

OP = "global_sigmoid_loss"


def global_sigmoid_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    gather_limit_bytes: int = GATHER_LIMIT_BYTES,
) -> Tensor:
    """`mmkernels.sigmoid_loss` of all pairs of the rows of all ranks: with M of them in the global batch and
    `x = logit_scale * A B^T + logit_bias`, `sum_ij softplus(-z_ij x_ij) / M`.

    Every rank gets the same value, and gradients whose *mean* over ranks is that of one process, as in
    `global_contrastive_loss`, whose arguments, result and errors these are. They are made in forward, 3u/W FLOP a rank
    of u = 2 M^2 D, with the transfers: evaluate under `torch.no_grad()`, and make of the loss the same on every rank.

    Args:
        logit_bias: the same on every rank: a finite float or a tensor of one element.

    Reference: `mmkernels.sigmoid_loss_ref` on the concatenated ranks. Paper: arXiv:2303.15343.
    """
    if world_size_of(group) == 1:
        return sigmoid_loss(a, b, logit_scale, logit_bias, labels=labels)

    def check() -> tuple[tuple[Tensor, ...], Header]:
        inputs = checked_sigmoid_operands(a, b, logit_scale, logit_bias, labels)
        return inputs, header(OP, ("a", "b", "logit_scale", "logit_bias"), inputs, labels, gather_limit_bytes)

    inputs, layout = agree(OP, group, a.device, check)
    if labels is None:
        own = layout.rows_of(layout.rank)
        row_labels = torch.arange(own.start, own.stop, device=a.device)
        col_labels = torch.arange(sum(layout.cols), device=a.device)
    else:
        row_labels, col_labels = labels[0], gather_rows(labels[1], layout.cols, group)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    columns = _Columns(shards_of(layout, [inputs[1]], gather_limit_bytes), row_labels, col_labels, needs)
    total = _SigmoidSum.apply(*inputs, columns)  # pyright: ignore[reportArgumentType]
    return global_mean(total / max(sum(layout.rows), 1), group).to(accumulator(inputs[0].dtype))  # pyright: ignore[reportOperatorIssue]


class _Columns(NamedTuple):
    """What this rank's rows are held against, and which gradients are wanted: of a, b, scale and bias."""

    shards: Shards
    row_labels: Tensor
    col_labels: Tensor
    needs: list[bool]


class _SigmoidSum(torch.autograd.Function):
    """The sum of the losses of this rank's rows against all columns, float64."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, columns: _Columns) -> Tensor:
        shards, needs = columns.shards, columns.needs
        a, scale, bias = a.detach(), scale.detach(), bias.detach()
        total = a.new_zeros((), dtype=torch.float64)
        sums: list[Tensor | None] = [None] * 4
        for cols, (of_cols,) in shards.blocks():
            labels = columns.row_labels, columns.col_labels[cols]
            loss, *grads = sigmoid_block((a, of_cols, scale, bias), labels, needs)
            total += loss
            if needs[1]:
                shards.add_grad(grads[1])
            for i in (0, 2, 3):
                if needs[i]:
                    so_far = sums[i]
                    sums[i] = grads[i] if so_far is None else so_far + grads[i]
        if needs[1]:
            sums[1] = shards.own_grad()
        ctx.save_for_backward(*sums)
        ctx.like = [(x.shape, x.dtype) for x in (a, b, scale, bias)]
        return total

    @staticmethod
    @first_order(OP, OVER_RANKS)
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(
            None if dx is None else (dx * grad).to(dtype).view(shape)
            for dx, (shape, dtype) in zip(ctx.saved_tensors, ctx.like, strict=True)
        ), None
