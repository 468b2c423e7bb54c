"""LLaVA on disk: transformers' Llava- and LlavaNextForConditionalGeneration, and the original's mm_projector.bin."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaNextConfig
from transformers import LlavaConfig as HFLlavaConfig

from mmcore.data.transforms.images import Preprocess
from mmcore.ops import require
from mmcore.parts import language_weights
from mmcore.parts.probe import check_head
from mmcore.parts.vit import VisionConfig
from mmcore.parts.vit_names import CLIP_TOWER, CLIP_TOWER_SETTINGS
from mmcore.systems.llava.inputs import processor_config, views
from mmcore.systems.llava.model import Llava, LlavaConfig
from mmcore.weights.files import read_json, read_pickle
from mmcore.weights.layout import Layout, under
from mmcore.weights.pictures import with_pictures
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
            ("lm_head.", f"{language_weights.LANGUAGE}lm_head."),
            (f"model.{language_weights.LANGUAGE}", f"{language_weights.LANGUAGE}{base}."),
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
    language_weights.check_language_kind(op, (raw.get("text_config") or {}).get("model_type", "llama"), is_causal=True)
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
    settings = HF_SETTINGS.write(op, model.config) | language_weights.language_settings(op, language, image_token)
    return settings | {"tie_word_embeddings": language.config.tie_word_embeddings}


def unread_norm(model: Llava) -> dict[str, Tensor]:
    """The norm behind the tower, which transformers wants and nobody reads."""
    width = model.config.vision.width
    return {f"{_POST}.weight": torch.ones(width), f"{_POST}.bias": torch.zeros(width)}


def load_llava(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> Llava:
    """A LLaVA on the CPU, in training mode, of a folder that transformers or `save_llava` wrote; its projector alone
    learns (`Llava.set_trainable`).

    `dtype` is the language model's, None = as it is stored; the rest is float32. A generation_config.json there is the
    language model's. A ValueError without such a folder, of a damaged file, missing or unknown names, wrong shapes, and
    of a model that ours is not.
    """
    model = read_llava(folder, dtype=dtype)
    check_head("load_llava", model.language_model)
    return model


def read_llava(folder: Path | str, *, dtype: torch.dtype | None = torch.float32) -> Llava:
    """As `load_llava`, whatever the language model's logits are made of."""
    folder, op = Path(folder), "load_llava"
    config, whole, unread = config_from_hf(op, read_json(op, folder / "config.json"))
    config = _with_pictures(op, folder, config)
    families: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    layout = hf_layout(families[type(whole.text_config)].base_model_prefix)
    return language_weights.load_with_language(
        op, folder, whole, dtype, layout, lambda x: Llava(config, x), unread=unread
    )


def _with_pictures(op: str, folder: Path, config: LlavaConfig) -> LlavaConfig:
    """With what the folder's image processor does; that of the first LLaVA may crop, where 1.5 pads."""

    def seen(preprocess: Preprocess, image: Image.Image) -> Tensor:
        vision = replace(config.vision, image_mean=preprocess.mean, image_std=preprocess.std)
        vision = replace(vision, interpolation=preprocess.interpolation)
        return views(image, replace(config, vision=vision, fit=preprocess.fit))

    found = with_pictures(op, folder, replace(config.vision, fit=config.fit), seen)
    return replace(config, vision=replace(found, fit=config.vision.fit), fit="pad" if config.has_tiles else found.fit)


def save_llava(model: Llava, folder: Path | str, *, tokenizer: Any | None = None) -> None:
    """Writes a new folder that transformers' Llava- or LlavaNextForConditionalGeneration.from_pretrained loads; for
    `<image>` and the tokenizer see `mmcore.parts.language_weights.save_with_language`. A ValueError of an existing
    folder, and of a tower, projector or language model that transformers' LLaVA cannot have."""
    processor = {
        "processor_class": "LlavaNextProcessor" if model.config.has_tiles else "LlavaProcessor",
        "image_token": language_weights.IMAGE_MARK,
        "patch_size": model.config.vision.patch_size,
        "vision_feature_select_strategy": "default",
        # the class token, which that strategy leaves out
        "num_additional_image_tokens": 1,
    }
    beside = processor, processor_config(model.config), unread_norm(model)
    language_weights.save_with_language("save_llava", folder, model, hf_config, hf_layout(), tokenizer, *beside)


def load_projector(model: Llava, file: Path | str) -> None:
    """Loads the original repository's mm_projector.bin, or the projector of a larger file of it, into a model; no other
    object of the pickle is made. A ValueError without such a file, or of another projector than the model's."""
    found = read_projector(file)
    wanted = model.projector.state_dict(prefix="projector.")
    shapes = [{n: list(x.shape) for n, x in state.items()} for state in (wanted, found)]
    what = "{} must hold a projector of shapes {}, got {}"
    require("load_projector", shapes[0] == shapes[1], what, file, *shapes)
    model.load_state_dict(found, strict=False)


def read_projector(file: Path | str) -> dict[str, Tensor]:
    """The projector in a file as `load_projector` takes it, by our names; a ValueError for anything else."""
    state, prefix = read_pickle("load_projector", Path(file)), "model.mm_"
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(f"{prefix}projector.")}
