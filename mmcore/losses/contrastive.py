"""InfoNCE over the global batch, exact in value and in gradient on any number of data-parallel ranks.

Each rank holds b rows of A and of B and computes its own [b, W*b] block of S = scale * A B^T once, for both
directions: the row statistics of the block are complete, the column statistics are reduced across ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.ops import contrastive_loss, contrastive_stats


class _AllGather(torch.autograd.Function):
    """Concatenates the ranks' rows; the backward sums each row's gradient over the ranks, at its owner."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        world_size = dist.get_world_size(group)
        gathered = x.new_empty((world_size * x.shape[0], *x.shape[1:]))
        dist.all_gather(list(gathered.chunk(world_size)), x.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, dgathered: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        world_size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        if dist.get_backend(ctx.group) == "gloo":  # gloo has no reduce-scatter
            dgathered = dgathered.contiguous()
            dist.all_reduce(dgathered, group=ctx.group)
            return dgathered.chunk(world_size)[rank], None
        dx = dgathered.new_empty((dgathered.shape[0] // world_size, *dgathered.shape[1:]))
        dist.reduce_scatter_tensor(dx, dgathered.contiguous(), group=ctx.group)
        return dx, None


def _check_even(num_rows: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Raises on every rank alike, where uneven collectives would hang."""
    extent = torch.tensor([num_rows, -num_rows], device=device)
    dist.all_reduce(extent, op=dist.ReduceOp.MAX, group=group)
    most, least = int(extent[0]), -int(extent[1])
    if most != least:
        raise ValueError(
            f"global_contrastive_loss: a must have the same number of rows on every rank, "
            f"got {least} to {most} over {dist.get_world_size(group)} ranks"
        )


def _reduced_logsumexp(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum over ranks of exp(x), elementwise, without a gradient."""
    top = x.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = torch.exp(x.detach() - top)
    dist.all_reduce(total, group=group)
    return top + total.log()


def global_contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Symmetric InfoNCE of the rows of all ranks: (mean_i CE(S_i, i) + mean_j CE(S_:j, j)) / 2.

    Every rank gets the loss of the global batch. Gradients are scaled so that the *mean* over ranks, which is
    what DDP and DeepSpeed form, equals the gradient that one process would compute on the whole batch, for the
    encoders and for `logit_scale` alike. Cost: 4u/W FLOP a rank (u = 2 N^2 D), one all-gather of `b`, one
    reduction of its gradient, two reductions of N floats.

    Args:
        a: [B, D] this rank's rows, float32, float16, bfloat16 or float64; B is the same on every rank.
        b: [B, D] their partners, same dtype and device.
        logit_scale: [] or [1] multiplier of the cosines (exponentiated, not its log).
        group: the data-parallel process group; None = the default one, or no distribution where none is set up.

    Returns:
        [] the loss, float32 (float64 for float64 input).

    Raises:
        ValueError: wrong shapes, dtypes, devices, or ranks with different numbers of rows.

    Reference: `mmkernels.contrastive.reference`. Papers: CLIP (arXiv 2103.00020), Inf-CL (arXiv 2410.17243).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return contrastive_loss(a, b, logit_scale)
    if a.shape != b.shape:
        raise ValueError(f"global_contrastive_loss: b must be {list(a.shape)} like a, got {list(b.shape)}")
    _check_even(a.shape[0], a.device, group)
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    all_b: Tensor = _AllGather.apply(b, group)  # pyright: ignore[reportAssignmentType]
    positives = torch.arange(a.shape[0], device=a.device) + rank * a.shape[0]
    row_lse, col_lse, positive = contrastive_stats(a, all_b, logit_scale, positives=positives)[:3]
    global_col_lse = _reduced_logsumexp(col_lse, group)
    share = torch.exp(col_lse.detach() - global_col_lse)  # [N] this rank's part of each column's softmax

    count = 2 * world_size * a.shape[0]
    rows = (row_lse - 2 * positive).sum() / count
    total = rows.detach().clone()
    dist.all_reduce(total, group=group)
    total = total + global_col_lse.sum() / count
    local = world_size * (rows + (share * col_lse).sum() / count)
    return total + (local - local.detach())
