"""CLIP's shapes by the names open_clip gives them, and two small ones for a first run."""

from dataclasses import replace

from mmcore.errors import did_you_mean
from mmcore.parts.vit import VisionConfig
from mmcore.systems.clip.model import CLIPConfig, TextConfig


def _vit(embed_dim: int, text_width: int, vision: VisionConfig, activation: str) -> CLIPConfig:
    text = TextConfig(
        width=text_width, num_heads=text_width // 64, mlp_dim=4 * text_width, activation=activation, eos_token_id=49407
    )
    return CLIPConfig(embed_dim=embed_dim, vision=replace(vision, activation=activation), text=text)


def _published(activation: str) -> dict[str, CLIPConfig]:
    large = VisionConfig(patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_dim=4096)
    return {
        "ViT-B-32": _vit(512, 512, VisionConfig(patch_size=32), activation),
        "ViT-B-16": _vit(512, 512, VisionConfig(patch_size=16), activation),
        "ViT-L-14": _vit(768, 768, large, activation),
        "ViT-L-14-336": _vit(768, 768, replace(large, image_size=336), activation),
    }


CLIP_CONFIGS: dict[str, CLIPConfig] = {
    # 8 x 8 scans, upsampled: learns scikit-learn's digits within a minute on two CPU cores
    "tiny": CLIPConfig(
        embed_dim=64,
        vision=VisionConfig(image_size=16, patch_size=4, width=128, num_layers=4, num_heads=4, mlp_dim=512),
        text=TextConfig(vocab_size=1024, context_length=32, width=128, num_layers=3, num_heads=4, mlp_dim=512),
    ),
    # pictures of 32 to 64 pixels
    "small": CLIPConfig(
        embed_dim=256,
        vision=VisionConfig(image_size=64, patch_size=8, width=256, num_layers=6, num_heads=4, mlp_dim=1024),
        text=TextConfig(vocab_size=4096, context_length=48, width=256, num_layers=4, num_heads=4, mlp_dim=1024),
    ),
    **_published("gelu"),
    # the activation of OpenAI's own weights
    **{f"{name}-quickgelu": config for name, config in _published("quick_gelu").items()},
}


def clip_config(
    name: str, *, vocab_size: int | None = None, context_length: int | None = None, eos_token_id: int | None = None
) -> CLIPConfig:
    """The configuration of that name in `CLIP_CONFIGS`, fitted to a tokenizer, of which None keeps its own (an
    `eos_token_id` that a smaller `vocab_size` no longer holds becomes None: the highest id of a row); raises ValueError
    for an unknown name."""
    if name not in CLIP_CONFIGS:
        hint = did_you_mean(name, CLIP_CONFIGS)
        raise ValueError(f"clip_config: name must be one of {', '.join(CLIP_CONFIGS)}, got {name!r}{hint}")
    config = CLIP_CONFIGS[name]
    vocab_size = config.text.vocab_size if vocab_size is None else vocab_size
    if eos_token_id is None and (config.text.eos_token_id or 0) < vocab_size:
        eos_token_id = config.text.eos_token_id
    if context_length is None:
        context_length = config.text.context_length
    text = replace(config.text, vocab_size=vocab_size, context_length=context_length, eos_token_id=eos_token_id)
    return replace(config, text=text)
