"""Eager contrastive statistics and loss, in the dtype they are given: what the other paths are held to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_stats_ref(
    a: Tensor, b: Tensor, logit_scale: float | Tensor, *, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`S = logit_scale * a b^T`, then `logsumexp(S, 1)`, `logsumexp(S, 0)` and `S[i, i + offset]`."""
    logits = _logits(a, b, logit_scale)
    rows = torch.arange(a.shape[0], device=a.device)
    return logits.logsumexp(1), logits.logsumexp(0), logits[rows, rows + offset]


def contrastive_loss_ref(a: Tensor, b: Tensor, logit_scale: float | Tensor) -> Tensor:
    """`(cross_entropy(S, arange) + cross_entropy(S^T, arange)) / 2`, as CLIP (arXiv:2103.00020) prints it."""
    logits = _logits(a, b, logit_scale)
    labels = torch.arange(a.shape[0], device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _logits(a: Tensor, b: Tensor, logit_scale: float | Tensor) -> Tensor:
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.reshape(()).to(a.dtype)
    return logit_scale * (a @ b.T)  # [M, N]
