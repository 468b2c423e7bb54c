"""Image towers of ours that are read as one vector an image."""

from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from mmcore.nn import PoolingHead
from mmcore.ops import require
from mmcore.parts.foreign import ForeignVision, projection
from mmcore.parts.vit import VisionConfig, ViT

ImagePool = Literal["class", "mean", "fc_norm", "head"]
"""The class token; the mean of the patches; their mean before the norm, which is of the mean then (timm's `fc_norm`);
SigLIP's head. All are behind the final norm."""


class ImageTower(ViT):
    """A ViT that is read as one vector an image (see `ImagePool`), and a projection: images to embeddings [B, E], not
    yet normalised. Every one has a norm of what is read.

    Args:
        embed_dim: E; None = there is no projection, and E is the tower's width.
    """

    def __init__(self, config: VisionConfig, embed_dim: int | None, pool: ImagePool = "class") -> None:
        super().__init__(config)
        known = get_args(ImagePool) if config.has_class_token else get_args(ImagePool)[1:]
        require("ImageTower", pool in known, "pool must be one of {}, got {!r}", known, pool)
        self.pool = pool
        self.norm_post = nn.LayerNorm(config.width, eps=config.norm_eps)
        if pool == "head":
            sizes = config.width, config.num_heads, config.mlp_dim
            self.head = PoolingHead(*sizes, activation=config.activation, norm_eps=config.norm_eps)
        self.proj = None if embed_dim is None else projection(config.width, embed_dim)

    def features(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] to [B, D]; see `ViT`."""
        if self.pool == "class":
            return super().forward(images, kept, pool=lambda x: x[:, 0])
        if self.pool == "fc_norm":
            states = self.transformer(self.embed(images, kept))
            return self.norm_post(states[:, self.config.num_prefix :].mean(1))
        states = self.states(images, kept)
        return self.head(states) if self.pool == "head" else states[:, self.config.num_prefix :].mean(1)

    def states(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] to those of all tokens, behind the final norm; see `ViT`."""
        return super().forward(images, kept)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, 3, S, S] to [B, E]."""
        x = self.features(images, kept)
        return x if self.proj is None else self.proj(x)


class PooledTower(NamedTuple):
    """The shape of an image tower, how it is read, and its weights by their names in an `ImageTower`, or in a
    `ForeignImageTower`."""

    config: VisionConfig | ForeignVision
    pool: ImagePool
    state: dict[str, Tensor]
