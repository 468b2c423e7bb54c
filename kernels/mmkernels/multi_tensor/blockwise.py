"""The updates on a CPU: in the native step's one pass over a table; or, as for float64 on any device, by ATen calls."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._philox import element_bits
from mmkernels.multi_tensor.reference import rounded_to_bfloat16
from mmkernels.multi_tensor.table import Table, flat

# Elements of a part that is widened at a time: 4 MiB of float32.
PART = 1 << 20


def ema_update_table(table: Table, weight: Tensor, seed: Tensor | None) -> None:
    """`target + weight (source - target)`, rounded by the bits of `seed` if there is one."""
    torch.ops.mmkernels.ema_update_table(table.chunks, table.tensors, weight, seed)


def adamw_update_table(table: Table, factors: Tensor) -> None:
    """A step of AdamW and of the averages, see `mmkernels.multi_tensor.adamw.adamw_factors`."""
    torch.ops.mmkernels.adamw_update_table(table.chunks, table.tensors, factors)


def squares_table(table: Table) -> Tensor:
    """The sum of squares, float64 `[]`."""
    total = torch.ops.mmkernels.squares_table(table.chunks, table.tensors)
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def clip_table(table: Table, norm: Tensor, max_norm: float) -> None:
    """Each tensor times `min(1, max_norm / (norm + 1e-6))`."""
    torch.ops.mmkernels.clip_table(table.chunks, table.tensors, norm, max_norm)


def fisher_accumulate_table(table: Table, weight: float, decay: float) -> None:
    """`decay fisher + weight grad^2`."""
    torch.ops.mmkernels.fisher_accumulate_table(table.chunks, table.tensors, weight, decay)


def ewc_penalty_fwd_table(table: Table) -> Tensor:
    """The sum of `fisher (param - anchor)^2`, float64 `[]`."""
    total = torch.ops.mmkernels.ewc_penalty_fwd_table(table.chunks, table.tensors)
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def ewc_penalty_bwd_table(table: Table, factor: Tensor) -> None:
    """Into the fourth list, `factor fisher (param - anchor)`."""
    torch.ops.mmkernels.ewc_penalty_bwd_table(table.chunks, table.tensors, factor)


def apply_masks_table(table: Table, first: int, last: int) -> None:
    """Zero where the mask is not between the two."""
    torch.ops.mmkernels.apply_masks_table(table.chunks, table.tensors, first, last)


def ema_update_(lists: Sequence[Sequence[Tensor]], weight: Tensor, seed: Tensor | None) -> None:
    """`target + weight (source - target)` of targets, sources and maybe shadows, rounded by the bits of `seed`."""
    for number, first, (target, source, shadow) in parts_of(lists):
        wide = accumulator(target.dtype)
        mean = torch.lerp(target.to(wide), source.to(wide), weight.to(wide))
        bits = None if seed is None else element_bits(seed, number, first, len(target))
        target.copy_(mean if bits is None else rounded_to_bfloat16(mean, bits))
        if shadow is not None:
            shadow.copy_(mean)


def adamw_update_(lists: Sequence[Sequence[Tensor]], factors: Tensor) -> None:
    """A step of AdamW and of the averages, of params, grads, exp_avgs, exp_avg_sqs, averages, copies and shadows."""
    for _, _, (param, grad, exp_avg, exp_avg_sq, average, copy, shadow) in parts_of(lists):
        wide = accumulator(param.dtype)
        keep, rise, beta2, fall, size, root, eps, low, high, weight = factors.to(wide).unbind()
        g = grad.to(wide)
        m = torch.lerp(exp_avg.to(wide), g, rise)
        v = beta2 * exp_avg_sq.to(wide) + fall * g * g
        p = keep * param.to(wide) - size * m / (root * v.sqrt() + eps)
        p = p.clamp(low, high)
        for x, value in ((param, p), (exp_avg, m), (exp_avg_sq, v), (copy, p)):
            if x is not None:
                x.copy_(value)
        if average is not None:
            mean = torch.lerp(average.to(wide), p, weight)
            average.copy_(mean)
            if shadow is not None:
                shadow.copy_(mean)


def squares(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """The sum of squares, float64 `[]`."""
    total = torch.zeros((), dtype=torch.float64, device=lists[0][0].device)
    for _, _, (x,) in parts_of(lists):
        total += x.double().square().sum()
    return total


def clip_(lists: Sequence[Sequence[Tensor]], norm: Tensor, max_norm: float) -> None:
    """Each tensor times `min(1, max_norm / (norm + 1e-6))`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    if factor.is_cpu and factor == 1:
        return
    for _, _, (x,) in parts_of(lists):
        wide = accumulator(x.dtype)
        x.copy_(factor.to(wide) * x.to(wide))


def fisher_accumulate_(lists: Sequence[Sequence[Tensor]], weight: float, decay: float) -> None:
    """`decay fisher + weight grad^2` of fishers and grads."""
    for _, _, (fisher, grad) in parts_of(lists):
        g = grad.to(fisher.dtype)
        fisher.mul_(decay).add_(weight * g * g)


def ewc_penalty_fwd(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """The sum of `fisher (param - anchor)^2` of params, anchors and fishers, float64 `[]`."""
    total = torch.zeros((), dtype=torch.float64, device=lists[0][0].device)
    for _, _, (param, anchor, fisher) in parts_of(lists):
        step = param.double() - anchor.double()
        total += (fisher.double() * step * step).sum()
    return total


def ewc_penalty_bwd(lists: Sequence[Sequence[Tensor]], factor: Tensor) -> None:
    """`factor fisher (param - anchor)` of params, anchors and fishers into grads."""
    for _, _, (param, anchor, fisher, grad) in parts_of(lists):
        wide = accumulator(grad.dtype)
        grad.copy_(factor.to(wide) * fisher.to(wide) * (param.to(wide) - anchor.to(wide)))


def apply_masks_(lists: Sequence[Sequence[Tensor]], first: int, last: int) -> None:
    """Zero where the mask is not between the two, of tensors and masks."""
    for _, _, (x, mask) in parts_of(lists):
        x.masked_fill_((mask < first) | (mask > last), 0)


def parts_of(lists: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int, int, list[Any]]]:
    """Number of a tensor, first element, and the flat part of it in each list, None where there is no list."""
    for number, like in enumerate(lists[0]):
        places = [flat(tensors[number]) if tensors else None for tensors in lists]
        for first in range(0, like.numel(), PART):
            yield number, first, [None if x is None else x[first : first + PART] for x in places]
