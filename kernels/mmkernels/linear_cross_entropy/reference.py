"""Eager linear cross-entropy, in the dtype it is given: what the other paths are held to."""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(hidden weight^T + bias, targets) + z_loss * logsumexp^2`, its logits stored whole."""
    logits = F.linear(hidden, weight, bias)  # [T, V]
    loss = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    kept = targets != ignore_index
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(1) ** 2).masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)
