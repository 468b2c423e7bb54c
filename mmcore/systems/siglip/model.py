"""SigLIP: an image tower and a text tower whose pairs are each told apart by a sigmoid (arXiv 2303.15343)."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn import PoolingHead
from mmcore.parts import text
from mmcore.parts.image_tower import PooledTower
from mmcore.parts.text import TextConfig
from mmcore.parts.vit import Tower, VisionConfig, ViT

text_config = partial(TextConfig, activation="gelu_tanh", norm_eps=1e-6)


@dataclass(frozen=True)
class SigLIPConfig:
    """Both towers; the space that they share is as wide as the image tower."""

    vision: VisionConfig
    text: TextConfig


class VisionTower(ViT):
    """Images [B, 3, S, S] to embeddings [B, D], not yet normalised."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.head = PoolingHead(
            config.width, config.num_heads, config.mlp_dim, activation=config.activation, norm_eps=config.norm_eps
        )

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, 3, S, S] to [B, D]."""
        return self.head(super().forward(images))


class TextTower(text.TextTower):
    """Captions, padded to the context, to embeddings [B, D], not yet normalised: each token sees all, pads too."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] int64 to [B, D], read at the last position, whatever stands there."""
        self.check("SigLIP", tokens, is_padded=True)
        x = self.transformer(self.token_embedding(tokens) + self.position_embedding, pool=lambda x: x[:, -1])
        return self.proj(self.norm_final(x))


class SigLIP(nn.Module):
    """Unit-norm embeddings, the logit scale (a log, from ln 10) and the logit bias (from -10), both [1] as in
    transformers: nearly all pairs are negatives, which the first steps would otherwise be spent on learning."""

    tower: type[VisionTower] = VisionTower

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = self.tower(config.vision)
        self.text = TextTower(config.text, config.vision.width, is_causal=False, bias=True)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def forward(
        self, images: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Embed images [B, 3, S, S], see `ViT`, and captions int64 [B', T], each padded to all T tokens of the context;
        pass None for a side that is not there. A ValueError of another shape or dtype, and of captions padded to the
        longest of them alone.

        Returns:
            image embeddings [B, D], text embeddings [B', D], exp(logit_scale) and logit_bias; at least float32.
        """
        wide = torch.promote_types(self.logit_scale.dtype, torch.float32)
        image = None if images is None else F.normalize(self.visual(images).to(wide), dim=-1)
        words = None if tokens is None else F.normalize(self.text(tokens).to(wide), dim=-1)
        return image, words, self.logit_scale.to(wide).exp(), self.logit_bias.to(wide)

    def image_tower(self) -> Tower:
        """The image tower without its pooling head, for models that read its states."""
        state = self.visual.state_dict()
        return Tower(self.config.vision, {n: x for n, x in state.items() if not n.startswith("head.")})

    def pooled_tower(self) -> PooledTower:
        """The image tower with its pooling head."""
        return PooledTower(self.config.vision, "head", self.visual.state_dict())
