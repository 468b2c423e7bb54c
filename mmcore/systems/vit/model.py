"""ViT: an image tower alone, and one with a linear head for classes (arXiv 2010.11929)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcore.nn import Linear
from mmcore.parts.image_tower import ImagePool, ImageTower, PooledTower
from mmcore.parts.vit import Tower, VisionConfig, ViT


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the tower."""

    vision: VisionConfig


@dataclass(frozen=True)
class ClassifierConfig(ViTConfig):
    """Shape of the tower, the names of the classes, and how the tower is read (see `ImageTower`)."""

    classes: tuple[str, ...] = ()
    pool: ImagePool = "class"


class ViTModel(nn.Module):
    """An image tower, `visual`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S], uint8 or normalised already, to the states of all tokens, [B, prefix + P, D]."""
        return self.visual(images)

    def image_tower(self) -> Tower:
        """The tower, without a mask token."""
        return Tower(self.config.vision, self.visual.state_dict()).bare

    def pooled_tower(self) -> PooledTower:
        """The tower, read at its class token."""
        tower = self.image_tower()
        return PooledTower(tower.config, "class", tower.state)


class ViTClassifier(nn.Module):
    """An image tower, `visual`, and a linear `head`; a tower that `is_locked` stays in evaluation mode."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ImageTower(config.vision, None, config.pool)
        self.head = Linear(config.vision.width, len(config.classes))
        self.is_locked = False
        # the deviation of the first logits is that of ViT-B's published 0.02 at any width
        nn.init.normal_(self.head.weight, std=0.02 * (768 / config.vision.width) ** 0.5)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "ViTClassifier":
        """As every module's."""
        super().train(mode)
        self.visual.train(mode and not self.is_locked)
        return self

    def forward(self, images: Tensor, *, only_states: bool = False) -> Tensor:
        """[B, 3, S, S], uint8 or normalised already, to logits [B, C], float32 or wider; `only_states`: to the tower's
        states, [B, prefix + P, D]."""
        if only_states:
            return self.visual.states(images)
        logits = self.head(self.visual.features(images))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def image_tower(self) -> Tower:
        """The tower, without SigLIP's head."""
        return Tower(self.config.vision, _without_head(self.visual.state_dict()))

    def pooled_tower(self) -> PooledTower:
        """The tower as its head reads it."""
        return PooledTower(self.config.vision, self.config.pool, self.visual.state_dict())


def _without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not name.startswith("head.")}
