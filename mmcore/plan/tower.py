"""The image tower of BLIP-2 and LLaVA as a plan sees it."""

from dataclasses import replace

import torch
from torch import Tensor

from mmcore.parts.vit import VisionConfig, ViT
from mmcore.plan.demand import Built
from mmcore.plan.job import Piece, Setting


def tower_piece(config: VisionConfig, *, learns: bool = False) -> Piece:
    """A ViT from pixels to states; frozen, it leaves nothing to a backward."""

    def build(num_layers: int, samples: int, setting: Setting) -> Built:
        tower = ViT(replace(config, num_layers=num_layers)).requires_grad_(learns)
        tower.transformer.activation_checkpointing = setting.activation_checkpointing
        images = torch.empty(samples, 3, config.image_size, config.image_size, dtype=torch.uint8)

        def forward() -> list[Tensor]:
            with torch.set_grad_enabled(learns):
                return [tower(images)]

        return Built(tower.parameters(), forward)

    return Piece("image tower" if learns else "image tower, frozen", config.num_layers, build)


def image_bytes(config: VisionConfig) -> int:
    """Bytes of an image as the loader hands it over, uint8."""
    return 3 * config.image_size**2
