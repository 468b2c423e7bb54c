"""A two-tower model small enough for many launches, with CLIP's interface, and its single-process truth."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcore.train.optim import OptimConfig, Rule

RULES = (Rule("logit_scale", clamp=(0.0, 4.6)),)
TOTAL = 6  # steps that a schedule of the weight decay is made for


def rules(frozen_until: int) -> tuple[Rule, ...]:
    """Those of TwoTower; where its text tower is frozen at first, its embeddings have a fixed learning rate."""
    more = Rule("text.", frozen_until=frozen_until), Rule("embed.", fixed_lr=True)
    return (*RULES, *(more if frozen_until else ()))


def optim(settings: dict[str, Any]) -> OptimConfig:
    return OptimConfig(**{"lr": 1e-2, "ema": 0.99, **settings})


class TwoTower(nn.Module):
    """image [B, 3, 4, 4] and tokens [B, 5] to unit-norm [B, 8] features; `logit_scale` is a log, shape [1]."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 8))
        self.embed = nn.Embedding(11, 12)
        self.text = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 8))
        self.logit_scale = nn.Parameter(torch.full((1,), 2.6593))
        with torch.no_grad():
            for p in self.parameters():
                if p.numel() > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        self.to(dtype)

    def forward(
        self, images: Tensor, tokens: Tensor, of_captions: list[int] | None = None, kept: None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert of_captions in (None, lengths(tokens))
        image = F.normalize(self.image(images), dim=-1)
        text = F.normalize(self.text(self.embed(tokens).mean(1)), dim=-1)
        return image, text, self.logit_scale.exp()


def batch(num: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The global batch of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(num, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, 11, (num, 5), generator=generator)


def lengths(tokens: Tensor) -> list[int]:
    """A number of each caption, which has to stay with it."""
    return tokens.sum(1).tolist()


def share(x: Tensor, rank: int, world_size: int) -> Tensor:
    """The contiguous rows that belong to a rank."""
    return x.chunk(world_size)[rank]


def eager_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The loss as the field writes it, on the whole batch."""
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Averaged(nn.Module):
    """x [B, 6] to [B, 5], of odd sizes, so that ranks cut through its weights; a frozen tower and buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Linear(6, 7)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 5))
        self.scale = nn.Parameter(torch.ones(1))
        self.mean: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.frozen(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(h.mean(0).to(self.mean.dtype), 0.25)  # stays float32
                self.count.add_(1)
        return self.body(h - self.mean.to(h.dtype)) * self.scale


def averaged_batch(step: int, rank: int = 0) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1000 * rank + step))
