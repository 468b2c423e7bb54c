"""What transformers calls BLIP-2's settings and weights: pure functions on dicts.

Names on the left are `BLIP2`'s. transformers splits the rows of q, k, v of the Q-Former
into layers of their own, and has neither the captions' head nor the temperature of stage 1: these keep our names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mmcore.ops import require
from mmcore.parts.language_weights import LANGUAGE
from mmcore.parts.vit import VisionConfig
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.model import BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.weights.names import to_ours, to_theirs

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
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
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
    theirs = {n: t for n, t in state.items() if not n.startswith(LANGUAGE) and n not in _BUFFERS}
    out = to_ours("load_blip2_lm", theirs, stage2_names(model), "a transformers file")
    return _flat_positions(out, model.visual.config.width)


def stage2_to_hf(model: BLIP2LM) -> dict[str, Tensor]:
    """Tower, Q-Former and projection under Blip2ForConditionalGeneration's names."""
    return _deep_positions(to_theirs(model.state_dict(), stage2_names(model)), model.visual.config.width)


def _flat_positions(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    shapes = {"visual.class_embedding": (-1,), "visual.position_embedding": (-1, width)}
    return state | {name: state[name].reshape(shape) for name, shape in shapes.items()}


def _deep_positions(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    names = [f"vision_model.embeddings.{name}" for name in ("class_embedding", "position_embedding")]
    return state | {name: state[name].reshape(1, -1, width) for name in names}


def to_hf(state: Mapping[str, Tensor], config: BLIP2Config) -> dict[str, Tensor]:
    """Our state dict under the names of Blip2ForImageTextRetrieval, and what that has not under ours."""
    alone = {name: state[name].detach().cpu().clone() for name in _OURS_ALONE}
    return _deep_positions(to_theirs(state, stage1_names(config)), config.vision.width) | alone


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
    """The image tower of any BLIP-2 of transformers under the names of `mmcore.parts.vit.ViT`, float32.

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
    """What transformers' Blip2ForImageTextRetrieval wants in config.json; our own settings beside it.

    Raises:
        ValueError: a tower that transformers' BLIP-2 cannot have.
    """
    return {
        **_hf_parts("save_blip2", config.vision, config.qformer),
        "architectures": ["Blip2ForImageTextRetrieval"],
        "image_text_hidden_size": config.embed_dim,
        "decoder_token_id": config.decoder_token_id,
        "init_temperature": config.init_temperature,
    }


def stage2_hf_config(model: BLIP2LM, image_token: int) -> dict[str, Any]:
    """What transformers' Blip2ForConditionalGeneration wants in config.json, whose language model has a row for the
    image token's id; our own setting, how many it has here, beside it.

    Raises:
        ValueError: a tower or a language model that transformers' BLIP-2 cannot have.
    """
    op, language = "save_blip2_lm", model.language_model
    text, generation = language.config.to_dict(), language.generation_config.to_dict()
    wanted, width = language.config.hidden_size, model.language_projection.out_features
    require(op, wanted == width, "embeddings must be as wide as the states, {}, got {}", wanted, width)
    num_rows = language.get_input_embeddings().num_embeddings
    # its generate asks the language model's configuration, and not generation_config.json, where a text ends
    ids = {name: generation[name] for name in _SPECIAL if generation.get(name) is not None}
    dtype = str(language.dtype).removeprefix("torch.")
    return {
        **_hf_parts(op, model.visual.config, model.qformer.config),
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_token_index": image_token,
        "language_vocab_size": num_rows,
        "text_config": {**text, **ids, "dtype": dtype, "vocab_size": max(num_rows, image_token + 1)},
    }


def _hf_parts(op: str, vision: VisionConfig, qformer: QFormerConfig) -> dict[str, Any]:
    is_eva = vision.has_patch_bias and not vision.has_norm_pre and vision.activation == "gelu"
    require(op, is_eva, "model must have EVA's tower, got {}", "a CLIP's, which transformers' BLIP-2 has not")
    return {
        "model_type": "blip-2",
        "dtype": "float32",
        "num_query_tokens": qformer.num_queries,
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
    vision, qformer = parts_from_hf("load_blip2", raw)
    return BLIP2Config(
        vision=vision,
        qformer=qformer,
        embed_dim=raw.get("image_text_hidden_size", 256),
        decoder_token_id=raw.get("decoder_token_id", qformer.vocab_size - 1),
        init_temperature=raw.get("init_temperature", 0.07),
    )


def parts_from_hf(op: str, raw: Mapping[str, Any]) -> tuple[VisionConfig, QFormerConfig]:
    """Tower and Q-Former of transformers' config.json.

    Raises:
        ValueError: another model type, or a setting that this BLIP-2 does not have.
    """
    kind = raw.get("model_type")
    require(op, kind == "blip-2", "config.json must have model_type 'blip-2', got {!r}", kind)
    parts = {name: raw.get(name) or {} for name in ("vision_config", "qformer_config")}
    for name, part in parts.items():
        act = part.get("hidden_act", "gelu")
        require(op, act == "gelu", "{}.hidden_act must be 'gelu', got {!r}", name, act)
    vision = vision_config_from_hf(parts["vision_config"])
    return vision, qformer_config_from_hf(parts["qformer_config"], raw, vision.width)


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
