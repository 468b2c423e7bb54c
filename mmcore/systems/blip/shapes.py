"""BLIP's shapes, by name."""

from typing import Any

from mmcore.parts.bert import BertConfig
from mmcore.systems.albef.shapes import TINY_VISION, base_vision, salesforce_vision
from mmcore.systems.blip.model import BLIPConfig


def blip_text(**options: Any) -> BertConfig:
    """`BertConfig` with the options of BLIP's: no types, images in every layer."""
    places = options.get("num_positions", 512)
    return BertConfig(num_types=0, context_length=min(64, places), **options)


_TINY_TEXT = {"width": 64, "num_layers": 3, "num_heads": 4, "mlp_dim": 256, "num_positions": 40, "image_width": 64}
_TINY_IDS: dict[str, Any] = {"decoder_token_id": 1022, "encoder_token_id": 1023, "end_token_id": 3}
_BASE = blip_text(vocab_size=30524, image_width=768)
_LARGE = salesforce_vision(224, 16, 1024, 24, 16, 4096)
BLIP_CONFIGS = {
    "tiny": BLIPConfig(TINY_VISION, blip_text(vocab_size=1024, **_TINY_TEXT), embed_dim=64, **_TINY_IDS),
    "base": BLIPConfig(base_vision(224), _BASE),
    "large": BLIPConfig(_LARGE, blip_text(vocab_size=30524, image_width=1024)),
}
"""For a first run on digits; as published, with the base and the large image tower."""
