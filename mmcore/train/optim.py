"""AdamW with an EMA of the weights, and CLIP's parameter groups and schedule."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are the CLIP recipe (arXiv 2103.00020, table 18; open_clip)."""

    lr: float = 5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.2
    """Decoupled weight decay, on parameters of two or more axes only."""
    warmup: int = 10_000
    """Steps of linear warm-up before the cosine; at most a tenth of the run is used."""
    ema: float | None = None
    """Decay of the exponential moving average of the weights, for example 0.9999; None = off."""

    def __post_init__(self) -> None:
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"--lr must be a positive number, got {self.lr}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"--ema must be in [0, 1), got {self.ema}")
        if self.warmup < 0:
            raise ValueError(f"--warmup must be a number of steps >= 0, got {self.warmup}")


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, plus per-group `ema` (decay or None) and `clamp` (low, high) of the weights.

    Both work on whatever tensors they are handed: parameters, or the flat partitions that ZeRO makes of a
    group. The EMA lives in `state[p]["ema"]`, so it is sharded exactly like the moments. Its decay is
    min(ema, (1 + t) / (10 + t)) at step t, which forgets the initial weights quickly.
    """

    def __init__(self, params: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(
            params,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for group in self.param_groups:
            group.setdefault("clamp", None)
            group.setdefault("ema", config.ema)

    @property
    def state_keys(self) -> list[str]:
        """Names of the per-element states that a checkpoint has to keep."""
        averaged = any(group["ema"] is not None for group in self.param_groups)
        return ["exp_avg", "exp_avg_sq", *(["ema"] if averaged else [])]

    def init_state(self, p: torch.Tensor, step: int) -> None:
        """Zero moments and an EMA equal to the weights, as they are before step `step`."""
        state = self.state[p]
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=p.device)
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
        if "ema" in self.state_keys:
            state["ema"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in stepped:
            if not self.state[p]:
                self.init_state(p, step=0)
        loss = super().step(closure)  # pyright: ignore[reportArgumentType]
        for group, p in stepped:
            if group["clamp"] is not None:
                p.clamp_(*group["clamp"])
            if group["ema"] is not None:
                t = self.state[p]["step"]
                rate = 1 - torch.clamp((1 + t) / (10 + t), max=group["ema"])
                self.state[p]["ema"].lerp_(p, rate.to(p.dtype))
        return loss


def clip_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """CLIP's groups: matrices decay, vectors do not, `logit_scale` is clamped to [0, ln 100] after each step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scale = [p for name, p in named if name == "logit_scale"]
    decay = [p for name, p in named if name != "logit_scale" and p.ndim > 1]
    no_decay = [p for name, p in named if name != "logit_scale" and p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
        {"params": scale, "weight_decay": 0.0, "clamp": (0.0, MAX_LOG_SCALE)},
    ]
    return [group for group in groups if group["params"]]


def cosine_lr(step: int, *, peak: float, warmup: int, total: int) -> float:
    """The learning rate of step `step` (from 0): linear to `peak` over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
