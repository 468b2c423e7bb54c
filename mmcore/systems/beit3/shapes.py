"""Shapes of BEiT-3 as published, and a small one for a first run on digits of 16 pixels."""

from collections.abc import Mapping
from functools import partial

from mmcore.systems.beit3.model import Beit3Config
from mmcore.systems.vit.shapes import vit_vision

_HALF = (0.5, 0.5, 0.5)
beit3_vision = partial(
    vit_vision, norm_eps=1e-5, has_mask_token=True, drop_path=0.1, image_mean=_HALF, image_std=_HALF, fit="squash"
)
"""`VisionConfig` with the options of the published model."""
_TINY = beit3_vision(16, 4, 64, 3, 4, 256, drop_path=0.0)
BEIT3_CONFIGS: Mapping[str, Beit3Config] = {
    "tiny": Beit3Config(_TINY, 1024, num_text=64, num_codes=32, init_std=0.05),
    "base": Beit3Config(beit3_vision(224, 16, 768, 12, 12, 3072)),
    "large": Beit3Config(beit3_vision(224, 16, 1024, 24, 16, 4096)),
    "giant": Beit3Config(beit3_vision(224, 14, 1408, 40, 16, 6144), decoupled=False),
}
