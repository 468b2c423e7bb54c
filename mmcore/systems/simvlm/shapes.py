"""SimVLM's shapes: base, large and huge as published, and a small one for a first run."""

from dataclasses import replace
from typing import Any

from mmcore.parts.text import TextConfig
from mmcore.parts.vit import VisionConfig
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.simvlm.model import SimVLMConfig

MAX_TEXT = 256
"""Tokens of a text as published."""
_tiny = CLIP_CONFIGS["tiny"].vision


def _of(width: int, num_layers: int, num_heads: int) -> SimVLMConfig:
    sizes: dict[str, Any] = {"width": width, "num_layers": num_layers, "num_heads": num_heads, "mlp_dim": 4 * width}
    vision = VisionConfig(patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, **sizes)
    return SimVLMConfig(vision, TextConfig(vocab_size=30522, context_length=MAX_TEXT, **sizes))


SIMVLM_CONFIGS: dict[str, SimVLMConfig] = {
    "tiny": SimVLMConfig(
        replace(_tiny, num_layers=3), TextConfig(1024, 32, _tiny.width, 2, _tiny.num_heads, _tiny.mlp_dim)
    ),
    "base": _of(768, 12, 12),
    "large": _of(1024, 24, 16),
    "huge": _of(1280, 32, 16),
}
