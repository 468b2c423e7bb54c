"""How the rows of a batch are assigned to clusters, over all ranks: evenly (Sinkhorn-Knopp), or as two sides agree on
it (xCLIP, arXiv:2210.09304)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.losses.matching import global_ratio
from mmcore.losses.ranks import world_size_of
from mmcore.nn.batch_norm import all_sum
from mmcore.ops import require

OP = "global_assignment_losses"


class AssignmentLosses(NamedTuple):
    """Of the global batch, each in nats, the means of both sides, differentiable."""

    agreement: Tensor  # cross-entropies of each side's assignment and the other's
    entropy: Tensor  # of each assignment: small where they are sharp
    entropy_of_mean: Tensor  # of the mean assignment, at most log K: large where all clusters are used


def global_assignment_losses(a: Tensor, b: Tensor, *, group: dist.ProcessGroup | None = None) -> AssignmentLosses:
    """With p_i and q_i the softmaxes of rows of `a` and `b`: mean_i (H(p_i, q_i) + H(q_i, p_i)) / 2,
    mean_i (H(p_i) + H(q_i)) / 2 and (H(mean_i p_i) + H(mean_i q_i)) / 2, over the rows of all ranks.

    Every rank gets the same values, and gradients whose *mean* over ranks is that of one process. Nothing is taken for
    a constant: without the third, subtracted, all rows fall into one cluster.

    Args:
        a: logits `[m, K]` of this rank's rows, float32, float16, bfloat16 or float64; m may differ among ranks.
        b: logits of their partners, the same shape.
        group: the data-parallel process group; None = the default one, or one process where none is set up.

    Returns:
        Three scalars, float32 (float64 for float64).

    Raises:
        ValueError: other shapes.

    Paper: arXiv:2210.09304.
    """
    fits = a.ndim == 2 and a.shape == b.shape and a.shape[1] >= 1
    require(OP, fits, "b must be [m, K] as a, got {} beside {}", list(b.shape), list(a.shape))
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    logs = [x.log_softmax(1, dtype=dtype) for x in (a, b)]
    shares, count = [x.exp() for x in logs], torch.tensor(len(a), device=a.device)
    both = ((shares[0], logs[1]), (shares[1], logs[0]))
    agreement = global_ratio(-torch.stack([(p * log).sum() for p, log in both]).sum() / 2, count, group)
    own = [(p * log).sum() for p, log in zip(shares, logs, strict=True)]
    entropy = global_ratio(-torch.stack(own).sum() / 2, count, group)
    sums = torch.cat([torch.stack([p.sum(0) for p in shares]).flatten(), count.to(dtype)[None]])
    if world_size_of(group) > 1:
        sums = all_sum(sums, group)
    mean = sums[:-1].view(2, -1) / sums[-1].clamp(min=1)
    return AssignmentLosses(agreement, entropy, torch.special.entr(mean).sum() / 2)


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, temperature: float, *, num_iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Logarithms of shares of clusters, of sum 1 in each row, such that over the rows of all ranks each cluster has
    nearly the same share: exp(logits / temperature), divided by the sums of clusters and then of rows, `num_iterations`
    times.

    In place of a softmax of the teacher's logits (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193): what is returned
    is what `mmkernels.distillation_loss` takes as the teacher's, at a temperature of 1.

    Args:
        logits: `[m, K]` of this rank's rows, floating point; m may differ by rank, and be 0.
        temperature: above 0.
        num_iterations: 1 or more.
        group: the data-parallel process group; None = the default one, or one process where none is set up.

    Returns:
        `[m, K]`, float32 (float64 for float64), a constant.

    Raises:
        ValueError: another shape, temperature or number.
    """
    op = "sinkhorn_knopp"
    require(op, logits.ndim == 2 and logits.shape[1] >= 1, "logits must be [m, K], got {}", list(logits.shape))
    require(op, temperature > 0, "temperature must be above 0, got {}", temperature)
    require(op, num_iterations >= 1, "num_iterations must be at least 1, got {}", num_iterations)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    for _ in range(num_iterations):
        x = x - _log_sum_of_columns(x, group)
        x = x - x.logsumexp(1, keepdim=True)
    return x


def _log_sum_of_columns(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[K]: the logarithm of the sum over all ranks' rows of exp(x), x [m, K]; anything where there are none."""
    is_alone = world_size_of(group) == 1
    largest = x.amax(0) if len(x) else x.new_full(x.shape[1:], -torch.inf)
    if not is_alone:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = (x - largest).exp().sum(0)
    if not is_alone:
        dist.all_reduce(sums, group=group)
    return largest + sums.log()
