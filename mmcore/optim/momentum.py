"""SGD with momentum, and LARS, which scales its steps by the norms of the weights."""

from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from mmcore.ema import Schedule
from mmcore.optim.base import EMAOptimizer, Group, grads_of


class SGDEMA(EMAOptimizer):
    """torch.optim.SGD with momentum, `b = momentum b + g + weight_decay p; p -= lr b`, and the average of the weights.

    Args:
        momentum: from 0 to less than 1.
        weight_decay: added to the gradient, at least 0.
        params, lr, ema, clamp, clip_each: as in `AdamWEMA`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        ema: float | Schedule | None = 0.9999,
        clamp: tuple[float, float] | None = None,
        clip_each: float | None = None,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, settings, ema, clamp, clip_each)

    def _moments(self, group: Group) -> list[str]:
        return ["momentum_buffer"]

    def _update(self, group: Group, params: list[Tensor], weights: list[Tensor], step: int) -> None:
        buffers = self._states(params, "momentum_buffer")
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, self._directions(group, params, weights))
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])
        self._finish(group, params, weights)

    def _directions(self, group: Group, params: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_add(grads_of(params, weights), weights, alpha=group["weight_decay"]))


class LARSEMA(SGDEMA):
    """`SGDEMA` whose direction `d = g + weight_decay p` is scaled to `0.001 |p| / |d|` for each parameter.

    Parameters of one axis or none are neither scaled nor decayed, as in SimCLR and MoCo v3.

    Papers: arXiv:1708.03888 (LARS), arXiv:2002.05709 (SimCLR), arXiv:2104.02057 (MoCo v3).
    """

    def _directions(self, group: Group, params: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        grads = [g.clone() for g in grads_of(params, weights)]
        scaled = [len(shape) > 1 for p in params for shape in self._shapes(p)]
        if not any(scaled):
            return grads
        parts = [
            list(compress((part for p, x in zip(params, xs, strict=True) for part in self._parts(p, x)), scaled))
            for xs in (grads, weights)
        ]
        torch._foreach_add_(parts[0], parts[1], alpha=group["weight_decay"])
        of_grads, of_weights = self._norms([*parts[0], *parts[1]]).chunk(2)
        trust = torch.where((of_grads > 0) & (of_weights > 0), 0.001 * of_weights / of_grads, 1.0)
        torch._foreach_mul_(parts[0], list(trust.unbind()))
        return grads
