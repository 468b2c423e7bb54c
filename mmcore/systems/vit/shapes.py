"""Shapes of ViT's towers as published, and a small one for a first run on digits of 16 pixels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mmcore.parts.vit import VisionConfig

# size of images and patches, width, layers, heads, width of the MLP
SIZES: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (16, 4, 64, 3, 4, 256),
    "ViT-Ti-16": (224, 16, 192, 12, 3, 768),
    "ViT-S-16": (224, 16, 384, 12, 6, 1536),
    "ViT-S-14": (224, 14, 384, 12, 6, 1536),
    "ViT-S-8": (224, 8, 384, 12, 6, 1536),
    "ViT-B-16": (224, 16, 768, 12, 12, 3072),
    "ViT-B-14": (224, 14, 768, 12, 12, 3072),
    "ViT-B-8": (224, 8, 768, 12, 12, 3072),
    "ViT-L-16": (224, 16, 1024, 24, 16, 4096),
    "ViT-L-14": (224, 14, 1024, 24, 16, 4096),
    "ViT-H-14": (224, 14, 1280, 32, 16, 5120),
    "ViT-g-14": (224, 14, 1536, 40, 24, 4096),
}
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
vit_vision = partial(
    VisionConfig,
    norm_eps=1e-6,
    has_norm_pre=False,
    has_patch_bias=True,
    has_final_norm=True,
    antialias=False,
    **IMAGENET,
)
"""`VisionConfig` with the options of the published towers, and ImageNet's mean and deviation."""


def shapes(make: Callable[[VisionConfig, bool], Any], *names: str, **options: Any) -> dict[str, Any]:
    """`make(vision, is_tiny)` of the towers of these names, and of the small one before them, each with `options` of
    `VisionConfig`."""
    return {name: make(vit_vision(*SIZES[name], **options), name == "tiny") for name in ("tiny", *names)}
