"""What transformers calls BLIP-2's settings and weights: pure functions on dicts.

Names on the left are :class:`mmcore.models.blip2.BLIP2`'s. transformers splits the rows of q, k, v of the Q-Former
into layers of their own, and has neither the captions' head nor the temperature of stage 1: these keep our names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mmcore.models.blip2 import BLIP2Config
from mmcore.models.blip2_lm import BLIP2LM
from mmcore.models.names import Names, to_ours, to_theirs
from mmcore.models.qformer import QFormerConfig
from mmcore.models.vit import VisionConfig

_VISION = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.position_embedding": "vision_model.embeddings.position_embedding",
    "visual.patch_embed.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.patch_embed.bias": "vision_model.embeddings.patch_embedding.bias",
    "norm_vision.weight": "vision_model.post_layernorm.weight",
    "norm_vision.bias": "vision_model.post_layernorm.bias",
}
_VISION_LEAVES = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.out": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QFORMER = {
    "qformer.queries": "query_tokens",
    "qformer.norm.weight": "qformer.layernorm.weight",
    "qformer.norm.bias": "qformer.layernorm.bias",
}
_TEXT = {
    "qformer.text.word.weight": "embeddings.word_embeddings.weight",
    "qformer.text.position.weight": "embeddings.position_embeddings.weight",
}
_LAYER = {
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.out": ("attention.output.dense",),
    "attn_norm.norm": ("attention.output.LayerNorm",),
    "query_mlp.fc1": ("intermediate_query.dense",),
    "query_mlp.fc2": ("output_query.dense",),
    "query_norm.norm": ("output_query.LayerNorm",),
}
_CROSS_LAYER = {
    "cross.q": ("crossattention.attention.query",),
    "cross.kv": ("crossattention.attention.key", "crossattention.attention.value"),
    "cross.out": ("crossattention.output.dense",),
    "cross_norm.norm": ("crossattention.output.LayerNorm",),
}
_TEXT_LAYER = {
    "text_mlp.fc1": ("intermediate.dense",),
    "text_mlp.fc2": ("output.dense",),
    "text_norm.norm": ("output.LayerNorm",),
}
_HEADS = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
_OURS_ALONE = ("text_head.transform.weight", "text_head.transform.bias", "text_head.norm.weight")
_OURS_ALONE += ("text_head.norm.bias", "text_head.bias", "temperature")
KINDS = ("weight", "bias")
# buffers that older files carry and no model needs
_BUFFERS = ("embeddings.position_ids",)


def vision_names(config: VisionConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our names of the image tower, and theirs."""
    for ours, theirs in _VISION.items():
        yield ours, (theirs,)
    for i in range(config.num_layers):
        for ours, theirs in _VISION_LEAVES.items():
            for kind in KINDS:
                yield (
                    f"visual.transformer.blocks.{i}.{ours}.{kind}",
                    (f"vision_model.encoder.layers.{i}.{theirs}.{kind}",),
                )


def qformer_names(config: QFormerConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our names of the Q-Former, and theirs."""
    for ours, theirs in (_QFORMER | (_TEXT if config.has_text else {})).items():
        yield ours, (theirs,)
    for i in range(config.num_layers):
        leaves = _LAYER | ({} if i % config.cross_every else _CROSS_LAYER)
        for ours, theirs in (leaves | (_TEXT_LAYER if config.has_text else {})).items():
            for kind in KINDS:
                yield (
                    f"qformer.blocks.{i}.{ours}.{kind}",
                    tuple(f"qformer.encoder.layer.{i}.{x}.{kind}" for x in theirs),
                )


def stage1_names(config: BLIP2Config) -> dict[str, tuple[str, ...]]:
    """Our name to Blip2ForImageTextRetrieval's, or to the several whose rows are one tensor here."""
    heads = {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in _HEADS.items() for kind in KINDS}
    return {**dict(vision_names(config.vision)), **dict(qformer_names(config.qformer)), **heads}


def stage2_names(model: BLIP2LM) -> dict[str, tuple[str, ...]]:
    """Our name to Blip2ForConditionalGeneration's; the language model's are its own."""
    projection = {f"language_projection.{kind}": (f"language_projection.{kind}",) for kind in KINDS}
    parts = (*vision_names(model.visual.config), *qformer_names(model.qformer.config))
    return {**dict(parts), **projection}


def stage2_from_hf(state: Mapping[str, Tensor], model: BLIP2LM) -> dict[str, Tensor]:
    """The state dict of Blip2ForConditionalGeneration, but for the language model's share, under our names.

    Raises:
        ValueError: missing or unknown names.
    """
    theirs = {n: t for n, t in state.items() if not n.startswith("language_model.") and n not in _BUFFERS}
    out = to_ours("load_blip2_lm", theirs, stage2_names(model), "a transformers file")
    return _flat_positions(out, model.visual.config.width)


def _flat_positions(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    shapes = {"visual.class_embedding": (-1,), "visual.position_embedding": (-1, width)}
    return state | {name: state[name].reshape(shape) for name, shape in shapes.items()}


def to_hf(state: Mapping[str, Tensor], config: BLIP2Config) -> dict[str, Tensor]:
    """Our state dict under the names of Blip2ForImageTextRetrieval, and what that has not under ours."""
    names: Names = stage1_names(config)
    out = to_theirs(state, names) | {name: state[name].detach().cpu().clone() for name in _OURS_ALONE}
    for name in ("class_embedding", "position_embedding"):
        key = f"vision_model.embeddings.{name}"
        out[key] = out[key].reshape(1, -1, config.vision.width)
    return out


def from_hf(state: Mapping[str, Tensor], config: BLIP2Config) -> dict[str, Tensor]:
    """The state dict of Blip2ForImageTextRetrieval under our names, float32, and what only ours has if it is there.

    Raises:
        ValueError: missing or unknown names.
    """
    extra = {name: t.float() for name, t in state.items() if name in _OURS_ALONE}
    theirs = {name: t for name, t in state.items() if name not in _BUFFERS and name not in extra}
    out = to_ours("load_blip2", theirs, stage1_names(config), "a transformers file")
    return _flat_positions(out, config.vision.width) | extra


def tower_from_hf(state: Mapping[str, Tensor], config: VisionConfig) -> dict[str, Tensor]:
    """The image tower of any BLIP-2 of transformers under the names of `mmcore.models.vit.ViT`, float32.

    Raises:
        ValueError: missing names.
    """
    names = {ours: theirs for ours, theirs in vision_names(config) if ours.startswith("visual.")}
    wanted = {name for theirs in names.values() for name in theirs}
    found = to_ours(
        "load_tower", {n: t for n, t in state.items() if n in wanted}, names, "a transformers file"
    )
    return {n.removeprefix("visual."): t for n, t in _flat_positions(found, config.width).items()}


def hf_config(config: BLIP2Config) -> dict[str, Any]:
    """What transformers' Blip2ForImageTextRetrieval wants in config.json; our own settings beside it."""
    vision, qformer = config.vision, config.qformer
    return {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "dtype": "float32",
        "image_text_hidden_size": config.embed_dim,
        "num_query_tokens": qformer.num_queries,
        "decoder_token_id": config.decoder_token_id,
        "init_temperature": config.init_temperature,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_dim,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.norm_eps,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.width,
            "num_hidden_layers": qformer.num_layers,
            "num_attention_heads": qformer.num_heads,
            "intermediate_size": qformer.mlp_dim,
            "hidden_dropout_prob": qformer.dropout,
            "attention_probs_dropout_prob": qformer.attention_dropout,
            "max_position_embeddings": qformer.max_text,
            "layer_norm_eps": qformer.norm_eps,
            "pad_token_id": qformer.pad_token_id,
            "cross_attention_frequency": qformer.cross_every,
            "encoder_hidden_size": qformer.image_width,
            "use_qformer_text_input": qformer.has_text,
        },
    }


def config_from_hf(raw: Mapping[str, Any]) -> BLIP2Config:
    """Read transformers' config.json; what it leaves out has transformers' defaults.

    Raises:
        ValueError: another model type, or a setting that this BLIP-2 does not have.
    """
    op = "load_blip2"
    if raw.get("model_type") != "blip-2":
        raise ValueError(f"{op}: config.json must have model_type 'blip-2', got {raw.get('model_type')!r}")
    vision, qformer = dict(raw.get("vision_config") or {}), dict(raw.get("qformer_config") or {})
    for name, part in (("vision_config", vision), ("qformer_config", qformer)):
        if part.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"{op}: {name}.hidden_act must be 'gelu', got {part['hidden_act']!r}")
    vocab_size = qformer.get("vocab_size", 30522)
    return BLIP2Config(
        vision=vision_config_from_hf(vision),
        qformer=qformer_config_from_hf(qformer, raw, vision.get("hidden_size", 1408)),
        embed_dim=raw.get("image_text_hidden_size", 256),
        decoder_token_id=raw.get("decoder_token_id", vocab_size - 1),
        init_temperature=raw.get("init_temperature", 0.07),
    )


def vision_config_from_hf(raw: Mapping[str, Any]) -> VisionConfig:
    """transformers' Blip2VisionConfig."""
    return VisionConfig(
        image_size=raw.get("image_size", 224),
        patch_size=raw.get("patch_size", 14),
        width=raw.get("hidden_size", 1408),
        num_layers=raw.get("num_hidden_layers", 39),
        num_heads=raw.get("num_attention_heads", 16),
        mlp_dim=raw.get("intermediate_size", 6144),
        norm_eps=raw.get("layer_norm_eps", 1e-6),
        has_norm_pre=False,
        has_patch_bias=True,
    )


def qformer_config_from_hf(
    raw: Mapping[str, Any], whole: Mapping[str, Any], image_width: int
) -> QFormerConfig:
    """transformers' Blip2QFormerConfig, as a part of a whole Blip2Config."""
    return QFormerConfig(
        num_queries=whole.get("num_query_tokens", 32),
        width=raw.get("hidden_size", 768),
        num_layers=raw.get("num_hidden_layers", 12),
        num_heads=raw.get("num_attention_heads", 12),
        mlp_dim=raw.get("intermediate_size", 3072),
        image_width=image_width,
        cross_every=raw.get("cross_attention_frequency", 2),
        has_text=raw.get("use_qformer_text_input", False),
        vocab_size=raw.get("vocab_size", 30522),
        max_text=raw.get("max_position_embeddings", 512),
        pad_token_id=raw.get("pad_token_id", 0) or 0,
        dropout=raw.get("hidden_dropout_prob", 0.1),
        attention_dropout=raw.get("attention_probs_dropout_prob", 0.1),
        norm_eps=raw.get("layer_norm_eps", 1e-12),
    )
