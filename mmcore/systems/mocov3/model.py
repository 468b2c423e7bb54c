"""MoCo v3: a ViT with patches that do not learn, a projector and a predictor (arXiv 2104.02057)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.losses import global_contrastive_loss
from mmcore.parts.heads import projection_head
from mmcore.parts.vit import Tower, VisionConfig
from mmcore.systems.vit.two_views import TwoViewConfig, TwoViewModel
from mmcore.systems.vit.weights import as_published

PATCHES = ("visual.patch_embed.weight", "visual.patch_embed.bias")
"""Weights that stay as they are drawn."""


class MoCoV3Model(TwoViewModel):
    """The tower, `visual`, read at its class token, and the heads, `projector` and `predictor`."""

    pool = "class"

    def head(self, sizes: Sequence[int]) -> nn.Sequential:
        return projection_head(sizes, bias=False, ends_normalised=True, ends_affine=False)

    predicting_head = head

    def __init__(self, config: TwoViewConfig) -> None:
        super().__init__(config)
        visual = self.visual
        # a patch's row before its column
        visual.position_embedding.copy_(torch.cat(visual.position_embedding.chunk(2, 1)[::-1], 1))  # pyright: ignore[reportOptionalMemberAccess]
        blocks: Any = visual.transformer.blocks
        for block in blocks:
            for layer in (x for x in block.modules() if isinstance(x, nn.Linear)):
                for part in layer.weight.chunk(3) if layer is block.attn.qkv else (layer.weight,):
                    nn.init.xavier_uniform_(part.data)
        assert visual.class_embedding is not None
        nn.init.normal_(visual.class_embedding, std=1e-6)
        for name in PATCHES:
            self.get_parameter(name).requires_grad_(False)

    def image_tower(self) -> Tower:
        """The tower, whose positions are a table like another to those who read it."""
        return Tower(as_published(self.config.vision), self.visual.state_dict())


def random_patches(vision: VisionConfig, seed: int) -> dict[str, Tensor]:
    """Weights of `PATCHES`, uniform as of a linear layer of a patch's pixels (Glorot)."""
    shape = vision.width, 3, vision.patch_size, vision.patch_size
    bound = math.sqrt(6 / (math.prod(shape[1:]) + vision.width))
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return dict(zip(PATCHES, (bound * (2 * drawn - 1), torch.zeros(vision.width)), strict=True))


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """2 t CE(q k^T / t) of unit queries and constant keys [B, D], against the keys of all ranks."""
    return 2 * temperature * global_contrastive_loss(queries, keys, 1 / temperature, symmetric=False)
