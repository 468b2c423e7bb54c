"""MAE: an encoder that reads some patches of an image, and a decoder that predicts the others (arXiv 2111.06377)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.data.transforms.masks import num_kept, random_mask, restore
from mmcore.nn import Linear, Transformer, sincos_positions
from mmcore.ops import require
from mmcore.parts.pixels import PixelTargets
from mmcore.parts.vit import Tower, VisionConfig, ViT, check_tower


@dataclass(frozen=True)
class MAEConfig:
    """Shape of the encoder and of the decoder; `mask_ratio` of the patches are masked."""

    vision: VisionConfig
    decoder_width: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 16
    decoder_mlp_dim: int = 2048
    mask_ratio: float = 0.75
    norm_pix: bool = True  # see `PixelTargets.norm`

    def __post_init__(self) -> None:
        sizes = {"num_layers": self.decoder_layers, "mlp_dim": self.decoder_mlp_dim}
        check_tower("MAEConfig.decoder", self.decoder_width, self.decoder_heads, self.vision.activation, **sizes)
        num, what = self.vision.num_patches, "mask_ratio must mask and leave at least one of {} patches, got {}"
        require("MAEConfig", 0 < num_kept(num, self.mask_ratio) < num, what, num, self.mask_ratio)

    @property
    def targets(self) -> PixelTargets:
        """What is predicted."""
        return PixelTargets(self.vision, self.norm_pix)

    def mask(self, rng: np.random.Generator) -> Tensor:
        """The patches of an image that are visible, int64 [K]."""
        return random_mask(self.vision.num_patches, self.mask_ratio, rng)


class MAE(nn.Module):
    """An encoder of visible patches, `visual`, and a narrow decoder of all."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        self.decoder = Decoder(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As published: matrices by Xavier, the convolution as one of them, tokens of deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        for token in (self.visual.class_embedding, self.decoder.mask_token):
            nn.init.normal_(token, std=0.02)  # pyright: ignore[reportArgumentType]

    def image_tower(self) -> Tower:
        """The encoder."""
        return Tower(self.config.vision, self.visual.state_dict())

    def forward(self, images: Tensor, kept: Tensor | None = None, *, only_states: bool = False) -> Any:
        """Predicts all patches from some.

        Args:
            images: [B, 3, S, S], uint8, or floating point where they are normalised already.
            kept: int64 [B, K], the patches that are visible.

        Returns:
            Predictions and targets, [B, P, C] each, as `mmcore.parts.pixels.patchify` orders pixels; with
            `only_states` what the encoder makes of whole images, [B, 1 + P, D].
        """
        if kept is None or only_states:
            return self.visual(images)
        return self.decoder(self.visual(images, kept), kept), self.config.targets(images)


class Decoder(nn.Module):
    """States of visible patches to pixels of all."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        vision, width, num_layers = config.vision, config.decoder_width, config.decoder_layers
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Buffer(sincos_positions(width, vision.num_patches))
        self.embed = Linear(vision.width, width)
        options = {"is_causal": False, "activation": vision.activation, "norm_eps": vision.norm_eps}
        self.transformer = Transformer(width, num_layers, config.decoder_heads, config.decoder_mlp_dim, **options)
        self.norm = nn.LayerNorm(width, eps=vision.norm_eps)
        self.head = Linear(width, 3 * vision.patch_size**2)

    def forward(self, states: Tensor, kept: Tensor) -> Tensor:
        """[B, 1 + K, D], the class token first, and [B, K] to [B, P, C]."""
        x = self.embed(states)
        patches = restore(x[:, 1:], kept, self.mask_token, len(self.position_embedding) - 1)
        x = torch.cat([x[:, :1], patches], 1) + self.position_embedding.to(self.embed.weight.dtype)
        return self.head(self.norm(self.transformer(x)))[:, 1:]
