"""BLIP-2 on disk as transformers has it: Blip2ForImageTextRetrieval, and of stage 2 Blip2ForConditionalGeneration."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config

from mmcore.parts.language_weights import check_language_kind, language_settings, load_with_language, save_with_language
from mmcore.parts.vit import Tower, ViT
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.shapes import eva_vision
from mmcore.weights.files import read_folder, read_json, save_folder
from mmcore.weights.layout import Layout, leading, optional, under
from mmcore.weights.pictures import processor_settings, with_pictures, write_pictures
from mmcore.weights.settings import Key, Settings, section, transformers_keys

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_VISION = {
    "class_embedding": leading("embeddings.class_embedding", 2),
    "position_embedding": leading("embeddings.position_embedding", 1),
    "patch_embed": "embeddings.patch_embedding",
    "transformer.blocks.{i}.norm1": "encoder.layers.{i}.layer_norm1",
    "transformer.blocks.{i}.attn.qkv": "encoder.layers.{i}.self_attn.qkv",
    "transformer.blocks.{i}.attn.out": "encoder.layers.{i}.self_attn.projection",
    "transformer.blocks.{i}.norm2": "encoder.layers.{i}.layer_norm2",
    "transformer.blocks.{i}.mlp": "encoder.layers.{i}.mlp",
}
_QFORMER_LAYER = {
    "attn.qkv": "attention.attention.{query,key,value}",
    "attn.out": "attention.output.dense",
    "attn_norm.norm": "attention.output.LayerNorm",
    "cross.q": "crossattention.attention.query",
    "cross.kv": "crossattention.attention.{key,value}",
    "cross.out": "crossattention.output.dense",
    "cross_norm.norm": "crossattention.output.LayerNorm",
    "query_mlp.fc1": "intermediate_query.dense",
    "query_mlp.fc2": "output_query.dense",
    "query_norm.norm": "output_query.LayerNorm",
    "text_mlp.fc1": "intermediate.dense",
    "text_mlp.fc2": "output.dense",
    "text_norm.norm": "output.LayerNorm",
}
HF = Layout(
    {
        **under("visual", "vision_model", _VISION),
        "norm_vision": "vision_model.post_layernorm",
        "qformer.queries": "query_tokens",
        "qformer.norm": "qformer.layernorm",
        "qformer.text.word": "embeddings.word_embeddings",
        "qformer.text.position": "embeddings.position_embeddings",
        **under("qformer.blocks.{i}", "qformer.encoder.layer.{i}", _QFORMER_LAYER),
        # of stage 1, for Blip2ForImageTextRetrieval, which has neither captions nor a temperature
        "vision_proj": "vision_projection",
        "text_proj": "text_projection",
        "itm_head": "itm_head",
        "text_head": optional("text_head"),
        "temperature": optional("temperature"),
        # of stage 2, for Blip2ForConditionalGeneration
        "language_projection": "language_projection",
    },
    tied={"text_head.weight": "qformer.text.word.weight"},
    unread=("embeddings.position_ids",),
)

_VISION_SETTINGS = {
    **transformers_keys(image_size=224, patch_size=14, width=1408, num_layers=39, num_heads=16),
    **transformers_keys(mlp_dim=6144, activation="gelu", norm_eps=1e-6),
}
_QFORMER_SETTINGS = {
    **transformers_keys(vocab_size=30522, width=768, num_layers=12, num_heads=12, mlp_dim=3072),
    **transformers_keys(dropout=0.1, attention_dropout=0.1, norm_eps=1e-12),
    "pad_token_id": Key("pad_token_id", 0, lambda x, _: x or 0),
    "max_text": Key("max_position_embeddings", 512),
    "cross_every": Key("cross_attention_frequency", 2),
    "has_text": Key("use_qformer_text_input", False),
    # transformers does not read it either
    "image_width": Key("encoder_hidden_size", None, lambda _, ours: ours["vision.width"]),
}

PARTS_SETTINGS = Settings(
    {
        **section("vision", "vision_config", _VISION_SETTINGS),
        **section("qformer", "qformer_config", _QFORMER_SETTINGS),
        "qformer.num_queries": Key("num_query_tokens", 32),
    },
    kinds={"vision": eva_vision, "qformer": QFormerConfig},
    model_types=("blip-2",),
    must={f"{x}_config.hidden_act": "gelu" for x in ("vision", "qformer")},
    written={
        "model_type": "blip-2",
        "dtype": "float32",
        "vision_config.model_type": "blip_2_vision_model",
        "qformer_config.model_type": "blip_2_qformer",
    },
)
"""Of the tower and the Q-Former, which both stages have."""
STAGE1_SETTINGS = replace(
    PARTS_SETTINGS,
    keys={
        **PARTS_SETTINGS.keys,
        "embed_dim": Key("image_text_hidden_size", 256),
        # not in transformers
        "decoder_token_id": Key(
            "decoder_token_id", None, lambda x, ours: ours["qformer.vocab_size"] - 1 if x is None else x
        ),
        "init_temperature": Key("init_temperature", 0.07),
    },
    kind=BLIP2Config,
    written={**PARTS_SETTINGS.written, "architectures": ["Blip2ForImageTextRetrieval"]},
)


def stage2_config(model: BLIP2LM, image_token: int) -> dict[str, Any]:
    """What transformers' Blip2ForConditionalGeneration wants in config.json; a ValueError for a model that it cannot
    have."""
    op, parts = "save_blip2_lm", {"vision": model.visual.config, "qformer": model.qformer.config}
    settings = PARTS_SETTINGS.write(op, parts) | language_settings(op, model.language_model, image_token)
    # its generate asks the language model's configuration, and not generation_config.json, where a text ends
    generation = model.language_model.generation_config.to_dict()
    ids = {n: x for n in _SPECIAL if (x := generation.get(n)) is not None}
    settings["text_config"] |= ids
    return settings | {"architectures": ["Blip2ForConditionalGeneration"]}


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A BLIP-2 of transformers: a `BLIP2LM` where it has a language model, in `dtype` or as it is stored, else a
    `BLIP2`; errors as of `load_blip2` and `load_blip2_lm`."""
    return load_blip2_lm(folder, dtype=dtype) if has_language_model(folder) else load_blip2(folder)


def has_language_model(folder: Path) -> bool:
    """Whether a folder is of transformers' Blip2ForConditionalGeneration."""
    config = folder / "config.json"
    kinds = read_json("stage2_start", config).get("architectures") if config.is_file() else None
    return "Blip2ForConditionalGeneration" in (kinds or ())


def load_blip2(folder: Path | str) -> BLIP2:
    """BLIP-2's first stage, float32 on the CPU, in training mode, of a folder that transformers or `save_blip2` wrote.

    The captions' head and the temperature, which transformers has not, start anew where they are not there. A
    ValueError without such a folder, of a damaged file, missing or unknown names, a Q-Former without a text branch.
    """
    folder, op = Path(folder), "load_blip2"
    config = STAGE1_SETTINGS.read(op, read_json(op, folder / "config.json"))
    model = BLIP2(replace(config, vision=with_pictures(op, folder, config.vision)))
    state = model.state_dict()
    model.load_state_dict(state | HF.read(op, read_folder(op, folder), state))
    return model


def load_blip2_tower(folder: Path | str) -> Tower:
    """The image tower, float32 on the CPU, in a folder of transformers or ours with a BLIP-2 of either stage; errors as
    of `load_blip2`."""
    folder, op = Path(folder), "load_tower"
    config = PARTS_SETTINGS.read(op, read_json(op, folder / "config.json"))["vision"]
    config = with_pictures(op, folder, config)
    with torch.device("meta"):
        wanted = ViT(config).state_dict(prefix="visual.")
    theirs = {n: x for n, x in read_folder(op, folder).items() if n.startswith("vision_model.")}
    state = HF.read(op, theirs, wanted, unread=["vision_model.post_layernorm"])
    return Tower(config, {name.removeprefix("visual."): x for name, x in state.items()})


def save_blip2(model: BLIP2, folder: Path | str) -> None:
    """Writes a new folder that transformers' Blip2ForImageTextRetrieval.from_pretrained loads. What that has not, the
    captions' head and the temperature, is in it under our names. A ValueError of an existing folder, and of a tower or
    sizes that transformers' BLIP-2 cannot have."""
    op = "save_blip2"
    config, preprocess = STAGE1_SETTINGS.write(op, model.config), model.config.vision.preprocess
    save_folder(op, folder, config, HF.write(model.state_dict()), lambda staged: write_pictures(staged, preprocess))


def load_blip2_lm(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> BLIP2LM:
    """BLIP-2's second stage, on the CPU, in training mode, of a folder that transformers or `save_blip2_lm` wrote.

    `dtype` is the language model's, None = as it is stored; the rest is float32. A generation_config.json there is the
    language model's. Errors are those of `load_blip2`, and of a folder without a language model.
    """
    folder, op = Path(folder), "load_blip2_lm"
    raw = read_json(op, folder / "config.json")
    parts = PARTS_SETTINGS.read(op, raw)
    parts["vision"] = with_pictures(op, folder, parts["vision"])
    check_language_kind(op, (raw.get("text_config") or {}).get("model_type", "opt"))
    whole: Any = Blip2Config.from_dict(dict(raw))
    return load_with_language(op, folder, whole, dtype, HF, lambda x: BLIP2LM(**parts, language_model=x))


def save_blip2_lm(model: BLIP2LM, folder: Path | str, *, tokenizer: Any | None = None) -> None:
    """Writes a new folder that transformers' Blip2ForConditionalGeneration.from_pretrained loads; for `<image>` and the
    tokenizer see `mmcore.parts.language_weights.save_with_language`. A ValueError of an existing folder, and of a tower
    or a language model that transformers' BLIP-2 cannot have."""
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": model.qformer.config.num_queries}
    pictures = processor_settings(model.visual.config.preprocess)
    save_with_language("save_blip2_lm", folder, model, stage2_config, HF, tokenizer, processor, pictures)
