"""ALBEF's shapes, by name."""

from functools import partial

from mmcore.parts.bert import BertConfig
from mmcore.parts.vit import VisionConfig
from mmcore.systems.albef.model import ALBEFConfig

salesforce_vision = partial(
    VisionConfig,
    norm_eps=1e-6,
    has_norm_pre=False,
    has_patch_bias=True,
    has_final_norm=True,
    antialias=False,
    fit="squash",
)
"""`VisionConfig` with the options of ALBEF's and BLIP's towers and what they want of a picture."""
base_vision = partial(salesforce_vision, patch_size=16, width=768, num_layers=12, num_heads=12, mlp_dim=3072)
"""ViT-B/16 for any size of images."""
TINY_VISION = salesforce_vision(16, 4, 64, 3, 4, 256)
_base_text = partial(BertConfig, image_width=768, first_cross=6, dropout=0.1, attention_dropout=0.1)
_TINY_TEXT = BertConfig(1024, 32, 64, 4, 4, 256, num_positions=32, image_width=64, first_cross=2)
ALBEF_CONFIGS = {
    "tiny": ALBEFConfig(TINY_VISION, _TINY_TEXT, embed_dim=64),
    "base": ALBEFConfig(base_vision(256), _base_text()),
}
"""For a first run on digits; as published."""
