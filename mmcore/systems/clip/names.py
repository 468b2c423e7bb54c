"""What transformers and open_clip call CLIP's settings and weights: pure functions on dicts.

Names on the left are :class:`mmcore.systems.clip.model.CLIP`'s. transformers splits the fused q, k, v rows into
three layers; open_clip keeps them fused but stores both projections as [D, E], a Linear's weight transposed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mmcore.parts.vit import VisionConfig
from mmcore.systems.clip.model import LEGACY_EOS_TOKEN_ID, CLIPConfig, TextConfig
from mmcore.weights.names import Names, to_ours, to_theirs

_OPEN_CLIP_NORM_EPS = 1e-5
_TRANSPOSED_IN_OPEN_CLIP = ("visual.proj.weight", "text.proj.weight")

_HF_LEAVES = {
    "norm1": "layer_norm1",
    "attn.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HF_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.patch_embed.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.position_embedding": "vision_model.embeddings.position_embedding.weight",
    # transformers' own spelling
    "visual.norm_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.norm_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.norm_post.weight": "vision_model.post_layernorm.weight",
    "visual.norm_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj.weight": "visual_projection.weight",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.position_embedding": "text_model.embeddings.position_embedding.weight",
    "text.norm_final.weight": "text_model.final_layer_norm.weight",
    "text.norm_final.bias": "text_model.final_layer_norm.bias",
    "text.proj.weight": "text_projection.weight",
}

_OPEN_CLIP_LEAVES = {
    "norm1": "ln_1",
    "attn.out": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "visual.class_embedding",
    "visual.patch_embed.weight": "visual.conv1.weight",
    "visual.position_embedding": "visual.positional_embedding",
    "visual.norm_pre.weight": "visual.ln_pre.weight",
    "visual.norm_pre.bias": "visual.ln_pre.bias",
    "visual.norm_post.weight": "visual.ln_post.weight",
    "visual.norm_post.bias": "visual.ln_post.bias",
    "visual.proj.weight": "visual.proj",
    "text.token_embedding.weight": "token_embedding.weight",
    "text.position_embedding": "positional_embedding",
    "text.norm_final.weight": "ln_final.weight",
    "text.norm_final.bias": "ln_final.bias",
    "text.proj.weight": "text_projection",
}

# buffers that older files carry and no model needs
_HF_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
_OPEN_CLIP_BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


def _block_names(
    config: CLIPConfig, towers: Mapping[str, str], leaves: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """(our name, their name without the kind, weight or bias) of the given layers in every block."""
    for tower, theirs in towers.items():
        num_layers = config.vision.num_layers if tower == "visual" else config.text.num_layers
        for i in range(num_layers):
            for leaf, their_leaf in leaves.items():
                for kind in ("weight", "bias"):
                    yield f"{tower}.transformer.blocks.{i}.{leaf}.{kind}", f"{theirs}.{i}.{their_leaf}", kind


def hf_names(config: CLIPConfig) -> dict[str, tuple[str, ...]]:
    """Our name to transformers' one name, or to its three for q, k, v."""
    towers = {"visual": "vision_model.encoder.layers", "text": "text_model.encoder.layers"}
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _HF_NAMES.items()}
    for ours, theirs, kind in _block_names(config, towers, _HF_LEAVES):
        names[ours] = (f"{theirs}.{kind}",)
    for ours, theirs, kind in _block_names(config, towers, {"attn.qkv": "self_attn"}):
        names[ours] = tuple(f"{theirs}.{x}_proj.{kind}" for x in "qkv")
    return names


def tower_names(config: VisionConfig) -> dict[str, tuple[str, ...]]:
    """Our name to transformers' of the image tower, without what comes behind its last layer."""
    behind = ("visual.norm_post.", "visual.proj.")
    names = hf_names(CLIPConfig(vision=config)).items()
    return {n: theirs for n, theirs in names if n.startswith("visual.") and not n.startswith(behind)}


def open_clip_names(config: CLIPConfig) -> dict[str, tuple[str, ...]]:
    """Our name to open_clip's."""
    towers = {"visual": "visual.transformer.resblocks", "text": "transformer.resblocks"}
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _OPEN_CLIP_NAMES.items()}
    for ours, theirs, kind in _block_names(config, towers, _OPEN_CLIP_LEAVES):
        names[ours] = (f"{theirs}.{kind}",)
    for ours, theirs, kind in _block_names(config, towers, {"attn.qkv": "attn"}):
        names[ours] = (f"{theirs}.in_proj_{kind}",)
    return names


def _export(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    out = to_theirs(state, names)
    return out | {"logit_scale": out["logit_scale"].reshape(())}


def _import(state: Mapping[str, Tensor], names: Names, what: str) -> dict[str, Tensor]:
    out = to_ours("load_clip", state, names, what)
    return out | {"logit_scale": out["logit_scale"].reshape(-1)}


def to_hf(state: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """Our state dict under transformers' CLIPModel names, `logit_scale` 0-d."""
    return _export(state, hf_names(config))


def from_hf(state: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """transformers' CLIPModel state dict under our names, float32; ValueError on missing or unknown names."""
    state = {name: tensor for name, tensor in state.items() if name not in _HF_BUFFERS}
    return _import(state, hf_names(config), "a transformers file")


def to_open_clip(state: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """Our state dict under open_clip's names, `logit_scale` 0-d, projections [D, E]."""
    state = {name: t.T if name in _TRANSPOSED_IN_OPEN_CLIP else t for name, t in state.items()}
    return _export(state, open_clip_names(config))


def from_open_clip(state: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """open_clip's state dict under our names, float32; ValueError on missing or unknown names.

    Takes also DDP's `module.` prefix and the `text.` prefix of open_clip's CustomTextCLIP.
    """
    plain = {name.removeprefix("module.").removeprefix("text."): tensor for name, tensor in state.items()}
    plain = {name: tensor for name, tensor in plain.items() if name not in _OPEN_CLIP_BUFFERS}
    ours = _import(plain, open_clip_names(config), "an open_clip file")
    for name in _TRANSPOSED_IN_OPEN_CLIP:
        ours[name] = ours[name].T.contiguous()
    return ours


def hf_config(config: CLIPConfig) -> dict[str, Any]:
    """What transformers' CLIPModel wants in config.json."""

    def tower(part: VisionConfig | TextConfig) -> dict[str, Any]:
        return {
            "hidden_size": part.width,
            "intermediate_size": part.mlp_dim,
            "num_hidden_layers": part.num_layers,
            "num_attention_heads": part.num_heads,
            "hidden_act": part.activation,
            "layer_norm_eps": part.norm_eps,
            "projection_dim": config.embed_dim,
        }

    text, vision = config.text, config.vision
    eos = LEGACY_EOS_TOKEN_ID if text.eos_token_id is None else text.eos_token_id
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_log_logit_scale,
        "text_config": {
            "model_type": "clip_text_model",
            **tower(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "eos_token_id": eos,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
    }


def config_from_hf(raw: Mapping[str, Any]) -> CLIPConfig:
    """Read transformers' config.json; what it leaves out has transformers' defaults.

    Raises:
        ValueError: another model type, or a setting that this CLIP does not have.
    """
    if raw.get("model_type") != "clip":
        raise ValueError(f"load_clip: config.json must have model_type 'clip', got {raw.get('model_type')!r}")
    # the *_dict form is older and, where present, wins
    text = dict(raw.get("text_config_dict") or raw.get("text_config") or {})
    vision = dict(raw.get("vision_config_dict") or raw.get("vision_config") or {})
    for name, tower in (("text_config", text), ("vision_config", vision)):
        if tower.get("attention_dropout"):
            raise ValueError(
                f"load_clip: {name}.attention_dropout must be 0, got {tower['attention_dropout']}"
            )
    if vision.get("num_channels", 3) != 3:
        raise ValueError(f"load_clip: vision_config.num_channels must be 3, got {vision['num_channels']}")
    eos = text.get("eos_token_id", 49407)
    return CLIPConfig(
        embed_dim=raw.get("projection_dim", 512),
        init_log_logit_scale=raw.get("logit_scale_init_value", 2.6592),
        vision=vision_from_hf(vision),
        text=TextConfig(
            vocab_size=text.get("vocab_size", 49408),
            context_length=text.get("max_position_embeddings", 77),
            width=text.get("hidden_size", 512),
            num_layers=text.get("num_hidden_layers", 12),
            num_heads=text.get("num_attention_heads", 8),
            mlp_dim=text.get("intermediate_size", 2048),
            activation=text.get("hidden_act", "quick_gelu"),
            norm_eps=text.get("layer_norm_eps", 1e-5),
            eos_token_id=None if eos == LEGACY_EOS_TOKEN_ID else eos,
        ),
    )


def vision_from_hf(raw: Mapping[str, Any]) -> VisionConfig:
    """transformers' CLIPVisionConfig."""
    return VisionConfig(
        image_size=raw.get("image_size", 224),
        patch_size=raw.get("patch_size", 32),
        width=raw.get("hidden_size", 768),
        num_layers=raw.get("num_hidden_layers", 12),
        num_heads=raw.get("num_attention_heads", 12),
        mlp_dim=raw.get("intermediate_size", 3072),
        activation=raw.get("hidden_act", "quick_gelu"),
        norm_eps=raw.get("layer_norm_eps", 1e-5),
    )


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """What open_clip wants in open_clip_config.json.

    Raises:
        ValueError: a setting that open_clip's CLIP does not have.
    """
    vision, text = config.vision, config.text
    if vision.activation != text.activation:
        raise ValueError(
            f"save_clip: open_clip has one activation for both towers, "
            f"got {vision.activation} and {text.activation}"
        )
    for part in (vision, text):
        if part.norm_eps != _OPEN_CLIP_NORM_EPS:
            raise ValueError(f"save_clip: open_clip has norm_eps {_OPEN_CLIP_NORM_EPS}, got {part.norm_eps}")
        if int(part.width * (part.mlp_dim / part.width)) != part.mlp_dim:
            raise ValueError(
                f"save_clip: open_clip cannot express mlp_dim {part.mlp_dim} of width {part.width}"
            )
    if text.eos_token_id not in (None, LEGACY_EOS_TOKEN_ID, text.vocab_size - 1):
        raise ValueError(
            f"save_clip: open_clip pools at the highest id, {text.vocab_size - 1}, "
            f"got eos_token_id {text.eos_token_id}"
        )
    model_cfg = {
        "embed_dim": config.embed_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.num_layers,
            "head_width": vision.width // vision.num_heads,
            "mlp_ratio": vision.mlp_dim / vision.width,
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.num_heads,
            "layers": text.num_layers,
            "mlp_ratio": text.mlp_dim / text.width,
        },
    }
    return {"model_cfg": model_cfg, "preprocess_cfg": {}}


_OPEN_CLIP_KEYS = {
    "model_cfg": ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"),
    "vision_cfg": ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"),
    "text_cfg": (
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "hf_tokenizer_name",
    ),
}


def config_from_open_clip(raw: Mapping[str, Any]) -> CLIPConfig:
    """Read open_clip_config.json; what it leaves out has open_clip's defaults.

    Raises:
        ValueError: a setting that this CLIP does not have (timm or transformers towers, other pooling).
    """
    model = raw.get("model_cfg", raw)
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(model.get(part), Mapping):
            raise ValueError(
                f"load_clip: open_clip_config.json must hold model_cfg.{part}, got {sorted(model)}"
            )
    for part, known in _OPEN_CLIP_KEYS.items():
        values = model if part == "model_cfg" else model[part]
        foreign = {name: value for name, value in values.items() if name not in known and value}
        if foreign:
            raise ValueError(f"load_clip: {part} must hold a plain ViT CLIP, got {foreign}")
    vision, text = model["vision_cfg"], model["text_cfg"]
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    vision_width, text_width = vision.get("width", 768), text.get("width", 512)
    return CLIPConfig(
        embed_dim=model["embed_dim"],
        vision=VisionConfig(
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            width=vision_width,
            num_layers=vision.get("layers", 12),
            num_heads=vision_width // vision.get("head_width", 64),
            mlp_dim=int(vision_width * vision.get("mlp_ratio", 4.0)),
            activation=activation,
        ),
        text=TextConfig(
            vocab_size=text.get("vocab_size", 49408),
            context_length=text.get("context_length", 77),
            width=text_width,
            num_layers=text.get("layers", 12),
            num_heads=text.get("heads", 8),
            mlp_dim=int(text_width * text.get("mlp_ratio", 4.0)),
            activation=activation,
        ),
    )
