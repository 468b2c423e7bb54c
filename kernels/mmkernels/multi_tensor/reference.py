"""The updates as the field writes them: tensor by tensor, in the accumulator's dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._philox import element_bits


def ema_update_ref_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    *,
    shadows: Sequence[Tensor] | None = None,
    rounding: str | None = None,
    seed: int | Tensor = 0,
) -> None:
    """`target = decay target + (1 - decay) source`, see `mmkernels.ema_update_`."""
    for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
        wide = accumulator(target.dtype)
        mean = torch.lerp(
            target.to(wide), source.to(wide), 1 - torch.as_tensor(decay, dtype=torch.float64).to(wide)
        )
        if rounding == "stochastic":
            key = torch.as_tensor(seed, device=target.device)
            bits = element_bits(key, number, 0, target.numel()).view(target.shape)
            target.copy_(rounded_to_bfloat16(mean, bits))
        else:
            target.copy_(mean)
        if shadows is not None:
            shadows[number].copy_(mean)


def rounded_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Float32 rounded up with the probability of what would be cut off, by the lower 16 of the random `bits`."""
    words = x.contiguous().view(torch.int32).to(torch.int64)
    up = ((words + (bits & 0xFFFF)) >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), up, x).to(torch.bfloat16)
