"""SimCLR: an image tower, and a projection that its loss reads (arXiv 2002.05709)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.ops import require
from mmcore.parts.heads import projection_head
from mmcore.parts.vit import VisionConfig, ViT


@dataclass(frozen=True)
class SimCLRConfig:
    """Shape of the tower, of which the mean of the patches is read, and of the head."""

    vision: VisionConfig
    hidden: int = 2048
    width: int = 128

    def __post_init__(self) -> None:
        for name in ("hidden", "width"):
            require(
                "SimCLRConfig", getattr(self, name) >= 1, "{} must be at least 1, got {}", name, getattr(self, name)
            )


class SimCLRModel(nn.Module):
    """The tower, `visual`, and the head, `projector`."""

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        sizes = config.vision.width, config.hidden, config.width
        self.projector = projection_head(sizes, ends_normalised=True)

    def forward(self, images: Tensor, *, only_states: bool = False) -> Any:
        """Views [B, V, 3, S, S] to unit-norm projections, one [B, W] a view, float32 or wider; `only_states`: images
        [B, 3, S, S] to the tower's states."""
        if only_states:
            return self.visual(images)
        states = self.visual(images.transpose(0, 1).flatten(0, 1))
        found = self.projector(states[:, self.config.vision.num_prefix :].mean(1))
        return F.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=1).chunk(images.shape[1])
