"""FILIP: CLIP's towers, each of whose tokens meets its best of the other side (arXiv 2111.07783)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcore.parts.image_tower import ImageTower
from mmcore.parts.vit import ViT
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextTower, eos_positions, unit_norm


class ImageTokens(ImageTower):
    """Images [B, 3, S, S] to embeddings of the class token and all patches [B, 1 + P, E], not yet normalised."""

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        assert self.proj is not None
        return self.proj(ViT.forward(self, images, kept))


class TextTokens(TextTower):
    """Captions int64 [B, T] to embeddings of their tokens [B, T, E], not yet normalised."""

    def forward(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        self.check("FILIP", tokens)
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        return self.proj(self.norm_final(self.transformer(x)))


class FILIP(CLIP):
    """CLIP, whose embeddings of an image or a caption are unit-norm ones of all tokens, with the class token and the
    end token, and zeros for what pads a caption."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.visual = ImageTokens(config.vision, config.embed_dim)
        self.text = TextTokens(config.text, config.embed_dim)

    def encode_image(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] to [B, 1 + P, E], float32."""
        return unit_norm(self.visual(images, kept))

    def encode_text(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """[B, T] to [B, T, E], float32; 0 behind the end token."""
        ends = eos_positions(tokens, self.text.eos_token_id)
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) > ends[:, None]
        return unit_norm(self.text(tokens)).masked_fill(is_padding[:, :, None], 0)
