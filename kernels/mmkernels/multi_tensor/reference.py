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
        mean = torch.lerp(target.to(wide), source.to(wide), 1 - torch.as_tensor(decay, dtype=torch.float64).to(wide))
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


def global_norm_ref(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of the norms, as `torch.nn.utils.get_total_norm` has it, see `mmkernels.global_norm`."""
    norms = [torch.linalg.vector_norm(x.to(accumulator(x.dtype))) for x in tensors]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in norms) else torch.float32
    return torch.linalg.vector_norm(torch.stack([x.to(wide) for x in norms])) if norms else torch.zeros(())


def clip_ref_(tensors: Sequence[Tensor], max_norm: float, *, norm: float | Tensor | None = None) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` on gradients, see `mmkernels.clip_`."""
    total = global_norm_ref(tensors)
    total = total if norm is None else torch.as_tensor(norm).to(total)
    factor = (max_norm / (total + 1e-6)).clamp(max=1)
    for x in tensors:
        wide = accumulator(x.dtype)
        x.copy_(x.to(wide) * factor.to(wide))
    return total


def fisher_accumulate_ref_(
    fishers: Sequence[Tensor], grads: Sequence[Tensor], *, weight: float = 1.0, decay: float = 1.0
) -> None:
    """`fisher = decay fisher + weight grad^2`, see `mmkernels.fisher_accumulate_`."""
    for fisher, grad in zip(fishers, grads, strict=True):
        fisher.copy_(decay * fisher + weight * grad.to(fisher.dtype).square())


def ewc_penalty_ref(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor], strength: float
) -> Tensor:
    """`strength / 2 sum fisher (param - anchor)^2`, see `mmkernels.ewc_penalty`."""
    total = torch.zeros(())
    for param, anchor, fisher in zip(params, anchors, fishers, strict=True):
        p, a, f = (x.to(accumulator(x.dtype)) for x in (param, anchor, fisher))
        total = total.to(p.device) + (f * (p - a).square()).sum()
    return strength / 2 * total


def apply_masks_ref_(
    tensors: Sequence[Tensor], masks: Sequence[Tensor], *, owners: tuple[int, int] | None = None
) -> None:
    """`x = x if mask else 0`, see `mmkernels.apply_masks_`."""
    first, last = owners or (1, 255)
    for x, mask in zip(tensors, masks, strict=True):
        x.copy_(torch.where((first <= mask) & (mask <= last), x, 0))


def rounded_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Float32 rounded up with the probability of what would be cut off, by the lower 16 of the random `bits`."""
    words = x.contiguous().view(torch.int32).to(torch.int64)
    up = ((words + (bits & 0xFFFF)) >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), up, x).to(torch.bfloat16)
