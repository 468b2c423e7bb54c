"""MoCo: an image tower and a projection (arXiv 1911.05722, 2003.04297)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.ops import contrastive_lse
from mmcore.parts.heads import projection_head
from mmcore.systems.vit.two_views import TwoViewConfig, TwoViewModel


@dataclass(frozen=True)
class MoCoConfig(TwoViewConfig):
    """Shape of the tower and the head, which may have a BatchNorm behind its hidden layer."""

    head_norm: bool = False


class MoCoModel(TwoViewModel):
    """The tower, `visual`, and the head, `projector`, of one layer in version 1, of two in version 2."""

    config: Any

    def head(self, sizes: Sequence[int]) -> nn.Sequential:
        return projection_head(sizes, normalised=self.config.head_norm)


def queue_losses(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Of each query its own key among that and a queue, -log(exp(q k) / (exp(q k) + sum_n exp(q n))), similarities over
    the temperature, without the [B, 1 + K] logits.

    Args:
        queries: unit vectors [B, D].
        keys: unit vectors [B, D], constants.
        queue: unit vectors [K, D], constants; K may be 0.
        temperature: above 0.

    Returns:
        [B], float32 (float64 of float64).
    """
    own = (queries * keys).sum(1) / temperature
    if not len(queue):
        return own - own
    return F.softplus(contrastive_lse(queries, queue.to(queries.dtype), 1 / temperature)[0] - own)


def random_keys(number: int, width: int, seed: int) -> Tensor:
    """What a queue begins with: random unit vectors [K, D], the same on every rank."""
    return F.normalize(torch.randn(number, width, generator=torch.Generator().manual_seed(seed)), dim=1)
