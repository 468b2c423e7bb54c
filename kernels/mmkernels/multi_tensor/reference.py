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


def adamw_update_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    step: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clamp: tuple[float, float] | None = None,
    averages: Sequence[Tensor] | None = None,
    decay: float | Tensor = 0.9999,
    copies: Sequence[Tensor] | None = None,
    shadows: Sequence[Tensor] | None = None,
) -> None:
    """AdamW as arXiv:1711.05101 writes it, then the average, see `mmkernels.adamw_update_`."""
    lr, step, (beta1, beta2) = float(lr), float(step), betas
    new = []
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p, g, m, v = (x.to(accumulator(param.dtype)) for x in (param, grad, exp_avg, exp_avg_sq))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = (1 - lr * weight_decay) * p
        p = p - lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps)
        p = p if clamp is None else p.clamp(*clamp)
        for x, value in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
            x.copy_(value)
        new.append(p)
    for number, p in enumerate(new):
        if copies is not None:
            copies[number].copy_(p)
    if averages is not None:
        ema_update_ref_(averages, new, decay, shadows=shadows)


def rounded_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Float32 rounded up with the probability of what would be cut off, by the lower 16 of the random `bits`."""
    words = x.contiguous().view(torch.int32).to(torch.int64)
    up = ((words + (bits & 0xFFFF)) >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), up, x).to(torch.bfloat16)
