"""SLIP: CLIP with SimCLR's head on the image tower (arXiv 2112.12750)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.parts.heads import projection_head
from mmcore.systems.clip.model import CLIP, TowersConfig


class SLIP(CLIP):
    """CLIP with `image_mlp` on what its image tower reads, before the projection."""

    def __init__(self, config: TowersConfig, hidden: int, width: int) -> None:
        super().__init__(config)
        self.image_mlp = projection_head((config.vision.width, hidden, hidden, width))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Any, *inputs: Any, views: Tensor | None = None, only_projection: bool = False, **more: Any
    ) -> Any:
        """As `CLIP.forward`; with `views` [B, 2, 3, S, S] of the images, before the logit scale besides the unit-norm
        projections of each of the two, [B, W]. `only_projection`: of images, what `image_mlp` makes of them."""
        if only_projection:
            return self.image_mlp(self.visual.features(images))
        found = super().forward(images, *inputs, **more)
        if views is None:
            return found
        image, text, scale = found
        both = [self.image_mlp(self.visual.features(x)) for x in views.unbind(1)]
        units = [F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in both]
        return image, text, *units, scale
