"""Eager sigmoid loss, in the dtype it is given: what the other paths are held to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss_ref(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`sum_j -log sigmoid(z_ij x_ij)` of each row i, `x = logit_scale * a b^T + logit_bias`, z = 1 at positives,
    else -1, as SigLIP (arXiv:2303.15343) prints it."""
    scale, bias = (x.reshape(()).to(a.dtype) if isinstance(x, Tensor) else x for x in (logit_scale, logit_bias))
    logits = scale * (a @ b.T) + bias  # [M, N]
    if labels is None:
        signs = torch.full_like(logits, -1.0, requires_grad=False).fill_diagonal_(1.0)
    else:
        signs = torch.where(labels[0][:, None] == labels[1], 1.0, -1.0).to(a.dtype)
    gains = F.logsigmoid(signs * logits)
    if reduction == "none":
        return -gains.sum(1)
    return -gains.sum() / (max(len(a), 1) if reduction == "mean" else 1)
