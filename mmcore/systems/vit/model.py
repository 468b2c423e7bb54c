"""A vision transformer without a head, which is what self-supervised towers are exported as (arXiv 2010.11929)."""

from dataclasses import dataclass

from torch import Tensor, nn

from mmcore.parts.image_tower import PooledTower
from mmcore.parts.vit import Tower, VisionConfig, ViT


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the tower."""

    vision: VisionConfig


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
