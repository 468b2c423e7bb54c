"""Losses and layers in another process, which imports no more than these."""

import pickle
from typing import Any

import torch
import torch.nn.functional as F

from mmcore.losses import ClipLoss, SigLipLoss
from mmcore.nn import BatchNorm, Linear


def losses() -> list[float]:
    """Of modules that went through a pickle: what a worker of torch.multiprocessing is handed."""
    generator = torch.Generator().manual_seed(0)
    a, b = F.normalize(torch.randn(2, 40, 16, generator=generator), dim=-1)
    parts: list[Any] = pickle.loads(pickle.dumps([ClipLoss(), SigLipLoss(), Linear(16, 8), BatchNorm(16)]))
    clip, sigmoid, linear, norm = parts
    with torch.no_grad():
        linear.weight.fill_(0.1)
        linear.bias.zero_()
    values = [clip(a, b, 10.0), sigmoid(a, b, 10.0, -10.0), linear(a).square().sum(), norm(a).pow(3).sum()]
    return [float(x) for x in values]


def send(pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(losses())
