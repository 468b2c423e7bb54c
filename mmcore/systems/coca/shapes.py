"""CoCa's shapes by the names that open_clip gives them, and a small one for a first run."""

from dataclasses import replace
from typing import Any

from mmcore.errors import did_you_mean
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.coca.model import CoCaConfig

CONTEXT = 76
"""Tokens of a caption as published; the class token is the 77th."""


def _of(name: str, **options: Any) -> CoCaConfig:
    """With the towers of a CLIP."""
    clip = CLIP_CONFIGS[name]
    width = clip.text.width
    text = replace(clip.text, context_length=min(CONTEXT, clip.text.context_length))
    return CoCaConfig(width, clip.vision, text, num_heads=clip.text.num_heads, **options)


COCA_CONFIGS: dict[str, CoCaConfig] = {
    "tiny": _of("tiny", num_layers=2, num_queries=9, num_pool_heads=4),
    "ViT-B-32": _of("ViT-B-32"),
    "ViT-L-14": _of("ViT-L-14"),
}


def coca_config(name: str) -> CoCaConfig:
    """The configuration of a name in `COCA_CONFIGS`; a ValueError for another."""
    if name not in COCA_CONFIGS:
        hint = did_you_mean(name, COCA_CONFIGS)
        raise ValueError(f"coca: --model must be one of {', '.join(COCA_CONFIGS)}, got {name!r}{hint}")
    return COCA_CONFIGS[name]
