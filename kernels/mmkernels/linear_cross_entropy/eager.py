"""Small shapes on a CPU: the reference on widened operands, every logit stored."""

from typing import Any

from torch import Tensor

from mmkernels._device import runs_triton
from mmkernels._numerics import widen
from mmkernels.linear_cross_entropy.reference import linear_cross_entropy_ref

# Up to so many multiplications the registered op's own call costs more than it saves.
EAGER_PRODUCT = 1 << 24


def is_faster(hidden: Tensor, weight: Tensor) -> bool:
    """A pure function of shape."""
    small = 0 < hidden.numel() * len(weight) < EAGER_PRODUCT
    return small and not hidden.is_cuda and not runs_triton(hidden)


def linear_cross_entropy_eager(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, ignore_index: int, **options: Any
) -> Tensor:
    """What an ignored row of `hidden` holds, NaN too, goes nowhere. `options` are the other arguments of
    `linear_cross_entropy`."""
    return linear_cross_entropy_ref(
        widen(hidden.masked_fill((targets == ignore_index)[:, None], 0)),
        widen(weight),
        targets,
        bias=None if bias is None else widen(bias),
        ignore_index=ignore_index,
        **options,
    )
