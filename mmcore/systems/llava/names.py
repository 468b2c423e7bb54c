"""What transformers calls the weights and settings of LLaVA; names on the left are `Llava`'s."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig as HFLlavaConfig
from transformers import LlavaNextConfig

from mmcore.ops import require
from mmcore.parts.language_weights import LANGUAGE, check_language_kind, language_settings
from mmcore.parts.vit import VisionConfig
from mmcore.parts.vit_names import CLIP_TOWER, CLIP_TOWER_SETTINGS
from mmcore.systems.llava.model import Llava, LlavaConfig
from mmcore.weights.layout import Layout, under
from mmcore.weights.settings import Key, Settings, section

_CONFIGS: dict[str, Any] = {"llava": HFLlavaConfig, "llava_next": LlavaNextConfig}
_TOWER = "vision_tower."
_VISION = f"{_TOWER}vision_model"
_POST = f"{_VISION}.post_layernorm"


def hf_layout(base: str = "model") -> Layout:
    """Of the first LLaVA in transformers, which every version reads; `base` is a language model without its head."""
    return Layout(
        {
            **under("visual", _VISION, CLIP_TOWER),
            "projector.0": "multi_modal_projector.linear_1",
            "projector.2": "multi_modal_projector.linear_2",
            "image_newline": "image_newline",
        },
        unread=(f"{_VISION}.embeddings.position_ids", _POST),
        # transformers 4 and 5, in memory or on disk
        older=(
            ("lm_head.", f"{LANGUAGE}lm_head."),
            (f"model.{LANGUAGE}", f"{LANGUAGE}{base}."),
            ("model.", ""),
            (f"{_VISION}.", _TOWER),
            (_TOWER, f"{_VISION}."),
        ),
    )


_FIXED = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",
    "vision_config.model_type": "clip_vision_model",
}
HF_SETTINGS = Settings(
    {
        **section("vision", "vision_config", CLIP_TOWER_SETTINGS),
        "grid_pinpoints": Key(
            "image_grid_pinpoints",
            (),
            lambda x, _: tuple((height, width) for height, width in x),
            lambda x, _: [list(size) for size in x] or ...,
        ),
    },
    kind=LlavaConfig,
    kinds={"vision": VisionConfig},
    model_types=tuple(_CONFIGS),
    must=_FIXED,
    written={
        **_FIXED,
        "model_type": lambda ours: "llava_next" if ours["grid_pinpoints"] else "llava",
        "architectures": lambda ours: [f"{'LlavaNext' if ours['grid_pinpoints'] else 'Llava'}ForConditionalGeneration"],
        "dtype": "float32",
        "image_seq_length": lambda ours: (ours["vision.image_size"] // ours["vision.patch_size"]) ** 2,
        # no layer is left out of what there is
        "vision_feature_layer": -1,
    },
)


def config_from_hf(op: str, raw: Mapping[str, Any]) -> tuple[LlavaConfig, Any, list[str]]:
    """Of transformers' config.json our configuration; transformers' of the whole; what its tower's layers that nobody
    runs are called. A ValueError of another model type, or of a setting that this LLaVA does not have."""
    HF_SETTINGS.check(op, raw)
    check_language_kind(op, (raw.get("text_config") or {}).get("model_type", "llama"), is_causal=True)
    whole = _CONFIGS[raw["model_type"]].from_dict(dict(raw))
    pinpoints = whole.image_grid_pinpoints if raw["model_type"] == "llava_next" else ()
    whole_raw = {"vision_config": whole.vision_config.to_dict(), "image_grid_pinpoints": pinpoints}
    config = HF_SETTINGS.read(op, {**raw, **whole_raw})
    layer, total = whole.vision_feature_layer, config.vision.num_layers
    run = layer + total + 1 if isinstance(layer, int) and layer < 0 else layer
    known = isinstance(run, int) and 1 <= run <= total
    require(op, known, "vision_feature_layer must be one of the tower's {}, got {}", total, layer)
    # as in transformers, where the whole model ties what it ties
    whole.text_config.tie_word_embeddings = whole.tie_word_embeddings
    config = replace(config, vision=replace(config.vision, num_layers=run))
    return config, whole, [f"{_VISION}.encoder.layers.{i}" for i in range(run, total)]


def hf_config(model: Llava, image_token: int) -> dict[str, Any]:
    """What transformers' LLaVA wants in config.json; a ValueError for a model that it cannot have."""
    op, language = "save_llava", model.language_model
    settings = HF_SETTINGS.write(op, model.config) | language_settings(op, language, image_token)
    return settings | {"tie_word_embeddings": language.config.tie_word_embeddings}


def unread_norm(model: Llava) -> dict[str, Tensor]:
    """The norm behind the tower, which transformers wants and nobody reads."""
    width = model.config.vision.width
    return {f"{_POST}.weight": torch.ones(width), f"{_POST}.bias": torch.zeros(width)}
