"""Shapes of VLMo as published, and a small one for a first run on digits of 16 pixels."""

from collections.abc import Mapping
from functools import partial

from mmcore.systems.vit.shapes import vit_vision
from mmcore.systems.vlmo.model import VlmoConfig

_HALF = (0.5, 0.5, 0.5)
vlmo_vision = partial(
    vit_vision,
    positions="none",
    relative_positions="layers",
    qkv_bias="q and v",
    layer_scale=0.1,
    drop_path=0.1,
    image_mean=_HALF,
    image_std=_HALF,
    fit="squash",
)
"""`VisionConfig` with the options of the published model."""
_absolute = partial(vlmo_vision, positions="learned", relative_positions="none", layer_scale=None)
_BOTH = {"positions": "learned", "layer_scale": None, "drop_path": 0.0}
VLMO_CONFIGS: Mapping[str, VlmoConfig] = {
    # with learned positions besides, and without the layer scale: for hundreds of steps
    "tiny": VlmoConfig(vlmo_vision(16, 4, 64, 4, 4, 256, **_BOTH), 1024, num_distances=40, num_joint=1, init_std=0.05),
    "base": VlmoConfig(vlmo_vision(224, 16, 768, 12, 12, 3072)),
    "base-plus": VlmoConfig(_absolute(224, 16, 544, 24, 16, 2176), num_joint=3),
    "large": VlmoConfig(vlmo_vision(224, 16, 1024, 24, 16, 4096), num_joint=3),
}
