"""BLIP-2's shapes by name: as published, and two small ones for a first run."""

from dataclasses import replace
from functools import partial

from mmcore.errors import did_you_mean
from mmcore.parts.vit import VisionConfig
from mmcore.systems.blip2.model import BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig

eva_vision = partial(VisionConfig, has_norm_pre=False, has_patch_bias=True)
"""`VisionConfig` with the options of EVA's tower."""
VIT_G = eva_vision(224, 14, 1408, 39, 16, 6144, norm_eps=1e-6)
"""EVA-CLIP's without its last layer, as LAVIS has it."""
_TINY = VisionConfig(16, 4, 128, 3, 4, 512)
_SMALL = VisionConfig(64, 8, 256, 5, 4, 1024)

BLIP2_CONFIGS: dict[str, BLIP2Config] = {
    # for the towers of CLIP's `tiny` and `small`
    "tiny": BLIP2Config(
        _TINY,
        QFormerConfig(8, 128, 4, 4, 512, _TINY.width, vocab_size=1024, max_text=64),
        embed_dim=64,
        decoder_token_id=1023,
    ),
    "small": BLIP2Config(
        _SMALL,
        QFormerConfig(16, 256, 4, 4, 1024, _SMALL.width, vocab_size=4096, max_text=64),
        embed_dim=128,
        decoder_token_id=4095,
    ),
    "ViT-g": BLIP2Config(VIT_G, QFormerConfig(image_width=VIT_G.width)),
}


def blip2_config(
    name: str,
    *,
    vision: VisionConfig | None = None,
    vocab_size: int | None = None,
    pad_token_id: int = 0,
    decoder_token_id: int | None = None,
) -> BLIP2Config:
    """The configuration of that name in `BLIP2_CONFIGS`, fitted to an image tower and a tokenizer, of which None keeps
    its own; a ValueError for an unknown name."""
    if name not in BLIP2_CONFIGS:
        hint = did_you_mean(name, BLIP2_CONFIGS)
        raise ValueError(f"blip2_config: name must be one of {', '.join(BLIP2_CONFIGS)}, got {name!r}{hint}")
    config = BLIP2_CONFIGS[name]
    vision = config.vision if vision is None else vision
    vocab_size = config.qformer.vocab_size if vocab_size is None else vocab_size
    qformer = replace(config.qformer, image_width=vision.width, vocab_size=vocab_size, pad_token_id=pad_token_id)
    decoder_token_id = vocab_size - 1 if decoder_token_id is None else decoder_token_id
    return replace(config, vision=vision, qformer=qformer, decoder_token_id=decoder_token_id)
