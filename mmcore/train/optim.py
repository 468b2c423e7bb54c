"""The settings of AdamW and its average, the parameter groups and the schedule."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from mmcore.ema import warmed_up
from mmcore.optim import AdamWEMA

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; CLIP's settings (arXiv 2103.00020, table 18) where a recipe has none of its own."""

    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 0.0
    """Learning rate that the warm-up starts from."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.2
    """Decoupled weight decay, on parameters of two or more axes only."""
    warmup: int = 10_000
    """Steps of linear warm-up before the cosine; at most --warmup-share of the run is used."""
    warmup_share: float = 0.1
    """Largest share of the run that the warm-up takes."""
    ema: float | None = None
    """Decay of the exponential moving average of the weights, for example 0.9999; None = off."""

    def __post_init__(self) -> None:
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"--lr must be a positive number, got {self.lr}")
        for name in ("min_lr", "warmup_lr"):
            if not 0 <= getattr(self, name) <= self.lr:
                value, flag = getattr(self, name), name.replace("_", "-")
                raise ValueError(f"--{flag} must be from 0 to --lr {self.lr}, got {value}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"--warmup-share must be in [0, 1], got {self.warmup_share}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"--ema must be in [0, 1), got {self.ema}")
        if self.warmup < 0:
            raise ValueError(f"--warmup must be a number of steps >= 0, got {self.warmup}")


def blip2_optim(warmup: int) -> OptimConfig:
    """BLIP-2's settings (arXiv 2301.12597, LAVIS), the stages differing in their warm-up."""
    decays = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05}
    return OptimConfig(lr=1e-4, min_lr=1e-5, warmup_lr=1e-6, warmup=warmup, **decays)


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> AdamWEMA:
    """The recipe's optimizer of parameter groups; its average is warmed up."""
    return AdamWEMA(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        ema=None if config.ema is None else warmed_up(config.ema),
    )


def param_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Trainable weights: matrices decay, vectors do not; CLIP's `logit_scale` stays in [0, ln 100].

    Args:
        model: whose weights.
        weight_decay: of matrices.
        lr_scales: `lr_scale` of a group, by the begin of its weights' names; of the others it is 1.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    scale = []
    for name, p in model.named_parameters():
        if p.requires_grad and name == "logit_scale":
            scale.append(p)
        elif p.requires_grad:
            lr_scale = next((x for begin, x in lr_scales.items() if name.startswith(begin)), 1.0)
            found.setdefault((lr_scale, weight_decay if p.ndim > 1 else 0.0), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay, "lr_scale": lr_scale}
        for (lr_scale, decay), params in sorted(found.items(), key=lambda item: item[0], reverse=True)
    ]
    if scale:
        clamp = (0.0, MAX_LOG_SCALE)
        groups.append({"params": scale, "weight_decay": 0.0, "lr_scale": 1.0, "clamp": clamp})
    return groups


def cosine_lr(step: int, optim: OptimConfig, total: int) -> float:
    """The learning rate of step `step` (from 0) of `total`: linear from `warmup_lr` to `lr`, a cosine to `min_lr`."""
    warmup = min(optim.warmup, max(1, int(total * optim.warmup_share)))
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * share))
