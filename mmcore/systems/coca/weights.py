"""CoCa's weights and settings as open_clip has them (coca_ViT-B-32, coca_ViT-L-14)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.systems.clip.names import OPEN_CLIP, OPEN_CLIP_BLOCK, OPEN_CLIP_SETTINGS
from mmcore.systems.clip.weights import find_weights
from mmcore.systems.coca.model import CoCa, CoCaConfig
from mmcore.weights.files import new_folder, read_json, read_pickle, read_safetensors, write_json, write_safetensors
from mmcore.weights.layout import Layout, Theirs, scalar, transposed, under
from mmcore.weights.settings import Key, Settings

MODEL_TYPE = "coca"
"""Of a config.json beside open_clip's files, which it needs none of."""
_CROSS = {
    "norm1": "ln_1",
    "norm_image": "ln_1_kv",
    "attn.{q,kv}.weight": "attn.in_proj_weight",
    "attn.{q,kv}.bias": "attn.in_proj_bias",
    "attn.out": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# torch's attention has one matrix where the keys are as wide as the queries
_ONE: dict[str, str | Theirs] = {"attn.{q,kv}.weight": "attn.in_proj_weight"}
_APART: dict[str, str | Theirs] = {"attn.q.weight": "attn.q_proj_weight", "attn.kv.weight": "attn.{k,v}_proj_weight"}


def layout(config: CoCaConfig) -> Layout:
    """The names of a shape's weights: ours, open_clip's."""
    pooler = {
        "queries": "query",
        "query_norm": "ln_q",
        "key_norm": "ln_k",
        **(_ONE if config.vision.width == config.embed_dim else _APART),
        "attn.{q,kv}.bias": "attn.in_proj_bias",
        "attn.out": "attn.out_proj",
    }
    return Layout(
        {
            "logit_scale": scalar("logit_scale"),
            **{n: x for n, x in OPEN_CLIP.rows.items() if n.startswith("visual.") and n != "visual.norm_post"},
            **under("visual.pooler", "visual.attn_pool", pooler),
            "visual.norm_pool": "visual.ln_post",
            "text.token_embedding": "text.token_embedding",
            "text.position_embedding": "text.positional_embedding",
            "text.class_embedding": "text.cls_emb",
            **under("text.transformer.blocks.{i}", "text.transformer.resblocks.{i}", OPEN_CLIP_BLOCK),
            "text.norm_final": "text.ln_final",
            "text.proj.weight": transposed("text.text_projection"),
            **under("decoder.blocks.{i}.text", "text_decoder.resblocks.{i}", OPEN_CLIP_BLOCK),
            **under("decoder.blocks.{i}.cross", "text_decoder.cross_attn.{i}", _CROSS),
            "decoder.norm_final": "text_decoder.ln_final",
            "decoder.head.weight": transposed("text_decoder.text_projection"),
        },
        unread=("text.attn_mask", "text_decoder.attn_mask"),
        older=(("module.", ""),),
        what="an open_clip file of a CoCa",
    )


def _current(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    model = raw.get("model_cfg", raw)
    parts = [model.get(f"{x}_cfg") if isinstance(model, Mapping) else None for x in ("multimodal", "text", "vision")]
    what = "open_clip_config.json must be of a CoCa, with model_cfg.{}, got {}"
    for name, part in zip(("multimodal_cfg", "text_cfg", "vision_cfg"), parts, strict=True):
        require("load_coca", isinstance(part, Mapping), what, name, sorted(model))
    decoder, text, vision = (part or {} for part in parts)
    of_hf = text.get("hf_model_name")
    require("load_coca", of_hf is None, "model_cfg.text_cfg must be of CLIP's tower, got hf_model_name {!r}", of_hf)
    flags = {"vision_cfg.attentional_pool": vision.get("attentional_pool"), "text_cfg.embed_cls": text.get("embed_cls")}
    for name, value in flags.items():
        require("load_coca", value is True, "open_clip_config.json must have model_cfg.{} true, got {}", name, value)
    for name, default in (("width", 512), ("vocab_size", 49408), ("context_length", 77)):
        ours, theirs = (x.get(name, default) for x in (text, decoder))
        fits = theirs >= ours if name == "context_length" else theirs == ours
        what = "open_clip_config.json must have model_cfg.multimodal_cfg.{} {}, as text_cfg has it, got {}"
        require("load_coca", fits, what, name, ours, theirs)
    return OPEN_CLIP_SETTINGS.current(raw)


_MULTIMODAL = ("width", "context_length", "vocab_size")
SETTINGS = Settings(
    {
        **OPEN_CLIP_SETTINGS.keys,
        "num_layers": Key("model_cfg.multimodal_cfg.layers", 12),
        "num_heads": Key("model_cfg.multimodal_cfg.heads", 8),
        "num_queries": Key("model_cfg.vision_cfg.attn_pooler_queries", 256),
        "num_pool_heads": Key("model_cfg.vision_cfg.attn_pooler_heads", 8),
    },
    kind=CoCaConfig,
    kinds=OPEN_CLIP_SETTINGS.kinds,
    must=OPEN_CLIP_SETTINGS.must,
    written={
        **OPEN_CLIP_SETTINGS.written,
        "model_cfg.custom_text": True,
        "model_cfg.vision_cfg.attentional_pool": True,
        "model_cfg.vision_cfg.output_tokens": True,
        "model_cfg.text_cfg.embed_cls": True,
        "model_cfg.text_cfg.output_tokens": True,
        **{f"model_cfg.multimodal_cfg.{n}": lambda ours, n=n: ours[f"text.{n}"] for n in _MULTIMODAL},
    },
    allowed=(
        *(OPEN_CLIP_SETTINGS.allowed or ()),
        *(f"model_cfg.{x}" for x in ("multimodal_cfg", "vision_cfg.output_tokens", "text_cfg.output_tokens")),
        *(f"model_cfg.{x}" for x in ("vision_cfg.attentional_pool", "text_cfg.embed_cls")),
    ),
    what=OPEN_CLIP_SETTINGS.what,
    current=_current,
    # open_clip has no choice of what padding is
    plain=lambda config: replace(OPEN_CLIP_SETTINGS.plain(config), pads_by_id=False),
)


def load_coca(path: str | Path, *, config: CoCaConfig | None = None) -> CoCa:
    """Load CoCa, float32 on the CPU, in training mode.

    Args:
        path: a folder of open_clip (open_clip_config.json and weights), or one weights file (.safetensors, .bin, .pt,
            .pth), such as a checkpoint of its training.
        config: the shape of the weights, for a file that has no configuration beside it; it wins over one.

    Raises:
        ValueError: no weights or no configuration found, another model's, missing or unknown names, wrong shapes, a
            file that is damaged or that holds pickled code.
    """
    op, file = "load_coca", find_weights(Path(path))
    beside = file.parent / SETTINGS.what
    what = "{} must lie beside the weights, or --model be given; {} is not there"
    require(op, config is not None or beside.is_file(), what, beside.name, beside)
    shape: CoCaConfig = config or SETTINGS.read(op, read_json(op, beside))
    tensors = (read_safetensors if file.suffix == ".safetensors" else read_pickle)(op, file)
    with torch.device("meta"):
        model = CoCa(shape)
    model.load_state_dict(layout(shape).read(op, tensors, model.state_dict()), assign=True)
    return model


def load_folder(folder: Path, *, dtype: torch.dtype | None = None) -> CoCa:
    """`load_coca`, as every system's folders are read; its weights are float32 whatever `dtype` is."""
    return load_coca(folder)


def save_coca(model: CoCa, folder: str | Path) -> None:
    """Write a new folder that open_clip's `local-dir:` loads; a ValueError of an existing one, or of a configuration
    that open_clip does not have, such as the correct mask of the class token."""
    op, config, state = "save_coca", model.config, model.state_dict()
    tensors: dict[str, Tensor] = layout(config).write(state)
    settings = SETTINGS.write(op, config)
    with new_folder(op, Path(folder)) as staged:
        write_safetensors(staged / "open_clip_model.safetensors", tensors)
        write_json(staged / SETTINGS.what, settings)
        write_json(staged / "config.json", {"model_type": MODEL_TYPE})
