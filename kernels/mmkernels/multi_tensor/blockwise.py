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


def parts_of(lists: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int, int, list[Any]]]:
    """Number of a tensor, first element, and the flat part of it in each list, None where there is no list."""
    for number, like in enumerate(lists[0]):
        places = [flat(tensors[number]) if tensors else None for tensors in lists]
        for first in range(0, like.numel(), PART):
            yield number, first, [None if x is None else x[first : first + PART] for x in places]
