"""A vision transformer: images to the states of their patches (arXiv:2010.11929)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmcore.data.transforms.images import IMAGE_MEAN, IMAGE_STD, Preprocess, normalized
from mmcore.nn import ACTIVATIONS, Transformer


def check_tower(owner: str, width: int, num_heads: int, activation: str, **sizes: int) -> None:
    """Raise a ValueError unless a transformer can have these sizes."""
    for name, value in {"width": width, "num_heads": num_heads, **sizes}.items():
        if value < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
    if width % num_heads:
        raise ValueError(f"{owner}: num_heads must divide width {width}, got {num_heads}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{owner}: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")


@dataclass(frozen=True)
class VisionConfig:
    """Shape of an image tower: square images of `image_size` pixels, patches of `patch_size` pixels.

    `has_norm_pre` and `has_patch_bias` tell CLIP's towers (the first alone) from EVA's (the second alone); the last
    four are of `Preprocess`.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-5
    has_norm_pre: bool = True
    has_patch_bias: bool = False
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["crop", "squash"] = "crop"

    def __post_init__(self) -> None:
        check_tower(
            "VisionConfig",
            self.width,
            self.num_heads,
            self.activation,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_layers=self.num_layers,
            mlp_dim=self.mlp_dim,
        )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"VisionConfig: image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}"
            )

        for name in ("image_mean", "image_std"):  # a run's config.json holds lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def preprocess(self) -> Preprocess:
        """What it wants of an image."""
        return Preprocess(self.image_size, self.image_mean, self.image_std, self.interpolation, self.fit)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Tower(NamedTuple):
    """The shape of a ViT and its weights by their names in it."""

    config: VisionConfig
    state: dict[str, Tensor]


class ViT(nn.Module):
    """A pre-LN transformer over a class token and patches, without a norm at its end."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=config.has_patch_bias)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.position_embedding = nn.Parameter(torch.randn(config.num_patches + 1, width) * width**-0.5)
        self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps) if config.has_norm_pre else nn.Identity()
        self.transformer = Transformer(
            width,
            config.num_layers,
            config.num_heads,
            config.mlp_dim,
            is_causal=False,
            activation=config.activation,
            norm_eps=config.norm_eps,
        )

    def forward(self, images: Tensor) -> Tensor:
        """The states of the class token and of the patches.

        Args:
            images: [B, 3, S, S], S the configured image size; uint8, or floating point where they are normalised
                already; B may be 0.

        Returns:
            [B, 1 + P, D].

        Raises:
            ValueError: another shape or dtype.
        """
        return self.transformer(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """What the transformer reads, of shapes as in `forward`."""
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"ViT: images must be [B, 3, {size}, {size}], got {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = normalized(images, self.config.image_mean, self.config.image_std)
        elif not images.is_floating_point():
            raise ValueError(f"ViT: images must be uint8 or floating point, got {images.dtype}")
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype))  # [B, D, S / P, S / P]
        x = x.flatten(2).transpose(1, 2)  # [B, P, D]
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        return self.norm_pre(x + self.position_embedding)
