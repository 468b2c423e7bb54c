"""What transformers and open_clip call the weights and settings of CLIP; names on the left are `CLIP`'s."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmcore.data.transforms.images import IMAGE_MEAN, IMAGE_STD
from mmcore.ops import require
from mmcore.parts.vit import VisionConfig
from mmcore.parts.vit_names import CLIP_BLOCK_SETTINGS, CLIP_TEXT, CLIP_TOWER, CLIP_TOWER_SETTINGS, POSITION_IDS
from mmcore.systems.clip.model import LEGACY_EOS_TOKEN_ID, CLIPConfig, TextConfig
from mmcore.weights.layout import Layout, scalar, transposed, under
from mmcore.weights.settings import Key, Settings, section, transformers_keys

HF = Layout(
    {
        "logit_scale": scalar("logit_scale"),
        **under("visual", "vision_model", {**CLIP_TOWER, "norm_post": "post_layernorm"}),
        "visual.proj": "visual_projection",
        **under("text", "text_model", CLIP_TEXT),
        "text.proj": "text_projection",
    },
    unread=POSITION_IDS,
)
OPEN_CLIP_BLOCK = {
    "norm1": "ln_1",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.out": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP = Layout(
    {
        "logit_scale": scalar("logit_scale"),
        "visual.class_embedding": "visual.class_embedding",
        "visual.patch_embed": "visual.conv1",
        "visual.position_embedding": "visual.positional_embedding",
        "visual.norm_pre": "visual.ln_pre",
        **under("visual.transformer.blocks.{i}", "visual.transformer.resblocks.{i}", OPEN_CLIP_BLOCK),
        "visual.norm_post": "visual.ln_post",
        "visual.proj.weight": transposed("visual.proj"),
        "text.token_embedding": "token_embedding",
        "text.position_embedding": "positional_embedding",
        **under("text.transformer.blocks.{i}", "transformer.resblocks.{i}", OPEN_CLIP_BLOCK),
        "text.norm_final": "ln_final",
        "text.proj.weight": transposed("text_projection"),
    },
    unread=("attn_mask", "input_resolution", "context_length", "vocab_size"),
    # of DDP, and of open_clip's CustomTextCLIP
    older=(("module.", ""), ("text.", "")),
    what="an open_clip file",
)

_TOWERS: dict[str, Any] = {"vision": VisionConfig, "text": TextConfig}
_TEXT = transformers_keys(vocab_size=49408, context_length=77, width=512, num_heads=8, mlp_dim=2048)


def _pooled_at_highest(config: CLIPConfig, *eos_token_ids: int) -> CLIPConfig:
    """With None for these end tokens, which mean the same."""
    is_same = config.text.eos_token_id in eos_token_ids
    return replace(config, text=replace(config.text, eos_token_id=None)) if is_same else config


HF_SETTINGS = Settings(
    {
        "embed_dim": Key("projection_dim", 512),
        "init_log_logit_scale": Key("logit_scale_init_value", 2.6592),
        **section("vision", "vision_config", CLIP_TOWER_SETTINGS),
        **section("text", "text_config", CLIP_BLOCK_SETTINGS | _TEXT),
        "text.eos_token_id": Key(
            "text_config.eos_token_id",
            49407,
            lambda x, _: None if x == LEGACY_EOS_TOKEN_ID else x,
            lambda x, _: LEGACY_EOS_TOKEN_ID if x is None else x,
        ),
    },
    kind=CLIPConfig,
    kinds=_TOWERS,
    model_types=("clip",),
    must={f"{x}_config.attention_dropout": 0 for x in _TOWERS} | {"vision_config.num_channels": 3},
    written={
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        **{f"{x}_config.model_type": f"clip_{x}_model" for x in _TOWERS},
        **{f"{x}_config.projection_dim": lambda ours: ours["embed_dim"] for x in _TOWERS},
    },
    # the *_dict form is older and, where present, wins
    current=lambda raw: dict(
        raw, **{f"{x}_config": raw.get(f"{x}_config_dict") or raw.get(f"{x}_config") for x in _TOWERS}
    ),
    plain=lambda config: _pooled_at_highest(config, LEGACY_EOS_TOKEN_ID),
)

_GELU = Key("quick_gelu", False, lambda x, _: "quick_gelu" if x else "gelu", lambda x, _: x == "quick_gelu")


def _mlp_ratio(width: str) -> Key:
    return Key("mlp_ratio", 4.0, lambda x, ours: int(ours[width] * x), lambda x, ours: x / ours[width])


def _as_today(raw: Mapping[str, Any]) -> dict[str, Any]:
    model = raw.get("model_cfg", raw)
    for name, x in (("model_cfg", model), ("preprocess_cfg", raw.get("preprocess_cfg") or {})):
        what = "open_clip_config.json must hold an object as {}, got {!r}"
        require("load_clip", isinstance(x, Mapping), what, name, x)
    for part in ("vision_cfg", "text_cfg"):
        what = "open_clip_config.json must hold model_cfg.{}, got {}"
        require("load_clip", isinstance(model.get(part), Mapping), what, part, sorted(model))
    layers = model["vision_cfg"].get("layers")
    what = "open_clip_config.json must be of a ViT, got model_cfg.vision_cfg.layers {} of a ResNet"
    require("load_clip", not isinstance(layers, list), what, layers)
    vision = _current(model["vision_cfg"], "vision_cfg", _VISION_CFG, pool_type="tok", pos_embed_type="learnable")
    text = _current(model["text_cfg"], "text_cfg", _TEXT_CFG, pool_type="argmax", proj_type="linear")
    # its own defaults; a file of a model alone has none
    pictures = dict(raw.get("preprocess_cfg") or {}) if "model_cfg" in raw else {}
    sizes, side = pictures.get("size"), vision.get("image_size", 224)
    is_same = sizes is None or set(sizes if isinstance(sizes, list) else [sizes]) == {side}
    what = "open_clip_config.json must have preprocess_cfg.size {}, as model_cfg has it, got {}"
    require("load_clip", is_same, what, side, sizes)
    return {"model_cfg": {**model, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": pictures}


def _current(given: Mapping[str, Any], part: str, keys: Mapping[str, Key], **defaults: str) -> dict[str, Any]:
    """A tower's settings without those that say what is so anyway; sizes as one number."""
    found = {name: x for name, x in given.items() if defaults.get(name, ...) != x}
    size = found.get("image_size")
    if isinstance(size, list) and len(set(size)) == 1:
        found["image_size"] = size[0]
    for name in sorted({key.name for key in keys.values()} & found.keys()):
        is_number = isinstance(found[name], int | float) and found[name] > 0
        what = "open_clip_config.json must have a number above 0 as model_cfg.{}.{}, got {}"
        require("load_clip", is_number, what, part, name, found[name])
    return found


_VISION_CFG = {
    **transformers_keys(image_size=224, patch_size=16),
    "width": Key("width", 768),
    "num_layers": Key("layers", 12),
    "num_heads": Key("head_width", 64, *[lambda x, ours: ours["vision.width"] // x] * 2),
    "mlp_dim": _mlp_ratio("vision.width"),
}
_FITS = {"shortest": "crop", "squash": "squash"}


def _resize_mode(fit: str) -> str:
    found = [theirs for theirs, ours in _FITS.items() if ours == fit]
    what = "fit must be one of {} in the format open_clip, got {!r}; the format hf has others"
    require("save_clip", bool(found), what, [*_FITS.values()], fit)
    return found[0]


_PREPROCESS_CFG = {
    "image_mean": Key("mean", IMAGE_MEAN, lambda x, _: tuple(x), lambda x, _: list(x)),
    "image_std": Key("std", IMAGE_STD, lambda x, _: tuple(x), lambda x, _: list(x)),
    "interpolation": Key("interpolation", "bicubic"),
    "fit": Key("resize_mode", "shortest", lambda x, _: _FITS.get(x, f"resize_mode {x}"), lambda x, _: _resize_mode(x)),
}
_TEXT_CFG = {
    "context_length": Key("context_length", 77),
    "vocab_size": Key("vocab_size", 49408),
    "width": Key("width", 512),
    "num_layers": Key("layers", 12),
    "num_heads": Key("heads", 8),
    "mlp_dim": _mlp_ratio("text.width"),
}
OPEN_CLIP_SETTINGS = Settings(
    {
        "embed_dim": Key("model_cfg.embed_dim"),
        **section("vision", "model_cfg.vision_cfg", _VISION_CFG),
        **section("text", "model_cfg.text_cfg", _TEXT_CFG),
        **section("vision", "model_cfg", {"activation": _GELU}),
        **section("text", "model_cfg", {"activation": _GELU}),
        **section("vision", "preprocess_cfg", _PREPROCESS_CFG),
    },
    kind=CLIPConfig,
    kinds=_TOWERS,
    must={"preprocess_cfg.mode": "RGB"},
    written={"preprocess_cfg.mode": "RGB", "preprocess_cfg.size": lambda ours: ours["vision.image_size"]},
    allowed=("model_cfg.custom_text", "model_cfg.text_cfg.hf_tokenizer_name", "preprocess_cfg"),
    what="open_clip_config.json",
    current=_as_today,
    # it does not tell what the logit scale began with
    plain=lambda config: replace(
        _pooled_at_highest(config, LEGACY_EOS_TOKEN_ID, config.text.vocab_size - 1),
        init_log_logit_scale=CLIPConfig.init_log_logit_scale,
    ),
)
