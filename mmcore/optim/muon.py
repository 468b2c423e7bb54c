"""Muon: steps of matrices along the nearest orthogonal matrix."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmcore.ema import Schedule
from mmcore.ops import require
from mmcore.optim.adamw import AdamWEMA
from mmcore.optim.base import EMAOptimizer, Group, grads_of


class MuonEMA(AdamWEMA):
    """torch.optim.Muon of matrices, `AdamWEMA` of the groups that say `muon=False`, and the average of the weights.

    The gradient's running mean, `m = momentum m + (1 - momentum) g`, looked at one step ahead (Nesterov), is brought
    close to the nearest orthogonal matrix by 5 steps of Newton and Schulz in bfloat16, and counts
    `0.2 sqrt(max(rows, columns))` times, so that its size is that of AdamW's steps and one learning rate serves both
    (`adjust_lr_fn="match_rms_adamw"`). Under ZeRO a group's matrices are gathered, and each rank computes those that it
    holds a part of.

    Args:
        params: parameters, or groups of them, matrices alone where `muon` is not False.
        momentum: of matrices, from 0 to less than 1.
        lr, betas, eps, weight_decay, ema, clamp, clip_each: as in `AdamWEMA`.

    Papers: arXiv:2502.16982 (Muon, its learning rate).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema: float | Schedule | None = 0.9999,
        clamp: tuple[float, float] | None = None,
        clip_each: float | None = None,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        EMAOptimizer.__init__(self, params, settings | {"muon": True}, ema, clamp, clip_each)

    def _moments(self, group: Group) -> list[str]:
        return ["exp_avg"] if group["muon"] else super()._moments(group)

    def _update(self, group: Group, params: list[Tensor], weights: list[Tensor], step: int) -> None:
        if not group["muon"]:
            return super()._update(group, params, weights, step)
        grads, means = grads_of(params, weights), self._states(params, "exp_avg")
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, means, group["momentum"])
        for p, update in zip(params, updates, strict=True):
            self._orthogonalize(p, update)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"])
        self._finish(group, params, weights)

    def _orthogonalize(self, p: Tensor, update: Tensor) -> None:
        """In place, of the matrices that `update` holds a part of, laid out like `p`; under ZeRO collective."""
        if self._shards is None:
            update.copy_(_orthogonal(update))
            return
        i, shards = self._index(p), self._shards
        for names in shards.pieces(shards.members[i]):
            whole = shards.gather(names, {i: update})
            held = [name for name in names if shards.fragment(name, {i: update}) is not None]
            shards.scatter({name: _orthogonal(whole[name]) for name in held}, {i: update})

    def _check(self, group: Group) -> None:
        super()._check(group)
        others = [list(p.shape) for p in group["params"] if group["muon"] and len(getattr(p, "ds_shape", p.shape)) != 2]
        sentence = "parameters must be matrices, or of a group with muon=False, got shape {}"
        require("MuonEMA", not others, sentence, *others[:1])


def _orthogonal(matrix: Tensor) -> Tensor:
    """What is near `U V^T` of `matrix = U S V^T`, [rows, columns], in bfloat16, of the size of an update of AdamW."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).float() * (0.2 * math.sqrt(max(matrix.shape)))
