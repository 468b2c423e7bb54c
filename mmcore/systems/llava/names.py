"""What transformers and the original repository call LLaVA's settings and weights: pure functions on dicts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlavaConfig as HFLlavaConfig
from transformers import LlavaNextConfig

from mmcore.ops import require
from mmcore.parts.language_weights import LANGUAGE, check_language_kind
from mmcore.parts.vit import VisionConfig
from mmcore.systems.clip import names as clip_names
from mmcore.systems.llava.model import Llava, LlavaConfig
from mmcore.weights.names import to_ours, to_theirs

TOWER = "vision_tower."
_POST = TOWER + "vision_model.post_layernorm."
_PROJECTOR = {
    "projector.0": "multi_modal_projector.linear_1",
    "projector.2": "multi_modal_projector.linear_2",
}
_NEWLINE = "image_newline"
_ORIGINAL = "model.mm_projector."
KINDS = ("weight", "bias")
# buffers that older files carry and no model needs
_BUFFERS = (TOWER + "vision_model.embeddings.position_ids",)
_CONFIGS: dict[str, Any] = {"llava": HFLlavaConfig, "llava_next": LlavaNextConfig}


class Parts(NamedTuple):
    """What config.json tells of: our configuration, and how many layers the file has that nobody runs."""

    config: LlavaConfig
    num_unused: int
    text: Any
    image_token: int


def parts_from_hf(op: str, raw: Mapping[str, Any]) -> Parts:
    """Read transformers' config.json; what it leaves out has transformers' defaults.

    Raises:
        ValueError: another model type, or a setting that this LLaVA does not have.
    """
    kind: Any = raw.get("model_type")
    require(op, kind in _CONFIGS, "config.json must have model_type 'llava' or 'llava_next', got {!r}", kind)
    for name, wanted in (
        ("projector_hidden_act", "gelu"),
        ("vision_feature_select_strategy", "default"),
        ("multimodal_projector_bias", True),
    ):
        value = raw.get(name, wanted)
        require(op, value == wanted, "config.json must have {} {!r}, got {!r}", name, wanted, value)
    tower = (raw.get("vision_config") or {}).get("model_type", "clip_vision_model")
    require(op, tower == "clip_vision_model", "vision_config must be of a clip_vision_model, got {!r}", tower)
    check_language_kind(op, (raw.get("text_config") or {}).get("model_type", "llama"), is_causal=True)
    whole = _CONFIGS[kind].from_dict(dict(raw))
    vision = clip_names.vision_from_hf(whole.vision_config.to_dict())
    layer, total = whole.vision_feature_layer, vision.num_layers
    run = layer + total + 1 if isinstance(layer, int) and layer < 0 else layer
    known = isinstance(run, int) and 1 <= run <= total
    require(op, known, "vision_feature_layer must be one of the tower's {}, got {}", total, layer)
    pinpoints = whole.image_grid_pinpoints if kind == "llava_next" else ()
    config = LlavaConfig(
        vision=replace(vision, num_layers=run),
        grid_pinpoints=tuple((height, width) for height, width in pinpoints),
    )
    # as in transformers, where the whole model ties what it ties
    whole.text_config.tie_word_embeddings = whole.tie_word_embeddings
    return Parts(config, total - run, whole.text_config, whole.image_token_index)


def hf_config(model: Llava, image_token: int) -> dict[str, Any]:
    """What transformers' LLaVA wants in config.json, whose language model has a row for the image token's id; our own
    setting, how many it has here, beside it.

    Raises:
        ValueError: a tower, a projector or a language model that transformers' LLaVA cannot have.
    """
    op, config, language = "save_llava", model.config, model.language_model
    vision = config.vision
    is_mlp = config.projector == "mlp2x_gelu"
    require(op, is_mlp, "projector must be 'mlp2x_gelu', transformers' only one, got {!r}", config.projector)
    is_clip = vision.has_norm_pre and not vision.has_patch_bias
    require(op, is_clip, "model must have a CLIP's tower, got {}", "one that transformers' LLaVA has not")
    wanted, width = language.config.hidden_size, language.get_input_embeddings().embedding_dim
    require(op, wanted == width, "embeddings must be as wide as the states, {}, got {}", wanted, width)
    num_rows = language.get_input_embeddings().num_embeddings
    kind, name = ("llava_next", "LlavaNext") if config.has_tiles else ("llava", "Llava")
    tiles = {"image_grid_pinpoints": [list(p) for p in config.grid_pinpoints]} if config.has_tiles else {}
    dtype = str(language.dtype).removeprefix("torch.")
    return {
        "model_type": kind,
        "architectures": [f"{name}ForConditionalGeneration"],
        "dtype": "float32",
        **tiles,
        "image_token_index": image_token,
        "image_seq_length": vision.num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": "default",
        # no layer is left out of what there is
        "vision_feature_layer": -1,
        "tie_word_embeddings": language.config.tie_word_embeddings,
        "language_vocab_size": num_rows,
        "text_config": {
            **language.config.to_dict(),
            "dtype": dtype,
            "vocab_size": max(num_rows, image_token + 1),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_dim,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.norm_eps,
        },
    }


def hf_names(config: LlavaConfig) -> dict[str, tuple[str, ...]]:
    """Our name to transformers', in the layout that every version reads; the language model's are its own."""
    names = _tower_names(config.vision)
    for ours, theirs in _PROJECTOR.items():
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in KINDS}
    return names | ({_NEWLINE: (_NEWLINE,)} if config.has_tiles else {})


def _tower_names(vision: VisionConfig) -> dict[str, tuple[str, ...]]:
    names = clip_names.tower_names(vision)
    return {ours: tuple(TOWER + x for x in theirs) for ours, theirs in names.items()}


def to_hf(model: Llava) -> dict[str, Tensor]:
    """Tower, projector and newline under transformers' names; the norm behind the tower, which nobody reads, is new."""
    width = model.config.vision.width
    post = {_POST + "weight": torch.ones(width), _POST + "bias": torch.zeros(width)}
    return to_theirs(model.state_dict(), hf_names(model.config)) | post


def from_hf(state: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Tower, projector and newline of `one_layout` under our names, float32, without layers that nobody runs.

    Raises:
        ValueError: missing or unknown names.
    """
    vision = parts.config.vision
    whole = _tower_names(replace(vision, num_layers=vision.num_layers + parts.num_unused))
    names = hf_names(parts.config)
    unread = {x for ours, theirs in whole.items() if ours not in names for x in theirs}
    unread |= {*_BUFFERS, *(_POST + kind for kind in KINDS)}
    theirs = {n: x for n, x in state.items() if n not in unread and not n.startswith(LANGUAGE)}
    return to_ours("load_llava", theirs, names, "a transformers file")


def one_layout(state: Mapping[str, Tensor], base: str) -> dict[str, Tensor]:
    """A state dict of transformers 4 or 5, in memory or on disk, in the layout of the first LLaVA there.

    Args:
        state: of any of them.
        base: what the language model calls all but its head ("model").
    """
    out = {}
    for name, x in state.items():
        if name.startswith("lm_head."):
            name = LANGUAGE + name
        elif name.startswith(f"model.{LANGUAGE}"):
            name = f"{LANGUAGE}{base}.{name.removeprefix(f'model.{LANGUAGE}')}"
        else:
            name = name.removeprefix("model.")
        if name.startswith(TOWER):
            name = f"{TOWER}vision_model.{name.removeprefix(TOWER).removeprefix('vision_model.')}"
        out[name] = x
    return out


def projector_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original repository's projector, whole checkpoints of it included, by our names."""
    return {n.removeprefix("model.mm_"): x for n, x in state.items() if n.startswith(_ORIGINAL)}
