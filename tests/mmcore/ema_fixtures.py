"""A small model with every kind of weight and buffer, and its training."""

import torch
from torch import Tensor, nn

from mmcore.ema import EMA
from mmcore.ema.weights import unwrapped


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)


def trained(model: nn.Module, steps: int, ema: EMA, first: int = 0) -> list[dict[str, Tensor]]:
    """The weights after each of some noisy steps."""
    seen = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        model(torch.randn(8, 3, dtype=next(model.parameters()).dtype))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ema.update()
        seen.append({name: p.detach().clone() for name, p in unwrapped(model).named_parameters()})
    return seen
