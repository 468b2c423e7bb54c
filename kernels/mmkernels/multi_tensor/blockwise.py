"""The updates on a CPU: in the native step's one pass over a table; or, as for float64 on any device, by ATen calls."""

from collections.abc import Sequence

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
    torch.ops.mmkernels.ema_update_table(table.rows, weight, seed)


def ema_update_(lists: Sequence[Sequence[Tensor]], weight: Tensor, seed: Tensor | None) -> None:
    """`target + weight (source - target)` of targets, sources and maybe shadows, rounded by the bits of `seed`."""
    for number, target in enumerate(lists[0]):
        places = [flat(tensors[number]) for tensors in lists if tensors]
        for first in range(0, target.numel(), PART):
            parts = [x[first : first + PART] for x in places]
            bits = None if seed is None else element_bits(seed, number, first, len(parts[0]))
            _update_part(parts, weight, bits)


def _update_part(parts: Sequence[Tensor], weight: Tensor, bits: Tensor | None) -> None:
    target, source, *shadow = parts
    wide = accumulator(target.dtype)
    mean = torch.lerp(target.to(wide), source.to(wide), weight.to(wide))
    target.copy_(mean if bits is None else rounded_to_bfloat16(mean, bits))
    for x in shadow:
        x.copy_(mean)
