"""A ViT's weights and settings as transformers' ViTModel and ViTForImageClassification, and timm, have them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmcore.ops import require
from mmcore.parts.timm_vit import timm_settings, tower_rows
from mmcore.parts.vit import Tower, VisionConfig
from mmcore.parts.vit_names import VIT_SETTINGS, VIT_TOWER
from mmcore.systems.vit.model import ClassifierConfig, ViTClassifier, ViTConfig, ViTModel
from mmcore.systems.vit.shapes import vit_vision
from mmcore.weights.files import read_folder, save_folder
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout, under
from mmcore.weights.settings import Key, Settings

LAYOUT = Layout(
    {f"visual.{name}": theirs for name, theirs in VIT_TOWER.items()},
    unread=("pooler", "classifier", "decoder", "embeddings.mask_token", "embeddings.position_ids"),
    older=(("vit.", ""),),
)
SETTINGS = Settings(
    {f"vision.{name}": key for name, key in VIT_SETTINGS.items()},
    kind=ViTConfig,
    kinds={"vision": vit_vision},
    model_types=("vit",),
    must={"qkv_bias": True, "num_channels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    written={"architectures": ["ViTModel"], "model_type": "vit", "dtype": "float32"},
)
FOLDER = ModelFolder("vit", ViTModel, SETTINGS, LAYOUT)


def _with_list(raw: Any) -> Any:
    """Settings whose names of classes are a list, in the order of their numbers."""
    names = raw.get("id2label")
    return raw if not isinstance(names, dict) else {**raw, "id2label": [names[i] for i in sorted(names, key=int)]}


CLASSIFIER_LAYOUT = Layout({**under("visual", "vit", VIT_TOWER), "head": "classifier"})
CLASSIFIER_SETTINGS = replace(
    SETTINGS,
    keys={
        **SETTINGS.keys,
        "classes": Key(
            "id2label",
            ("LABEL_0", "LABEL_1"),
            read=lambda names, _: tuple(names),
            write=lambda names, _: {str(i): name for i, name in enumerate(names)},
        ),
    },
    kind=ClassifierConfig,
    written={
        **SETTINGS.written,
        "architectures": ["ViTForImageClassification"],
        "label2id": lambda ours: {name: i for i, name in enumerate(ours["classes"])},
    },
    current=_with_list,
)
CLASSIFIER_FOLDER = ModelFolder("vit", ViTClassifier, CLASSIFIER_SETTINGS, CLASSIFIER_LAYOUT)


def load_vit(folder: Path | str, *, dtype: torch.dtype | None = None) -> Any:
    """The `ViTClassifier` of a folder of transformers whose weights have a classifier, else the `ViTModel`; see
    `ModelFolder.load`."""
    is_classifier = "classifier.weight" in read_folder("load_vit", Path(folder))
    return (CLASSIFIER_FOLDER if is_classifier else FOLDER).load(folder, dtype=dtype)


def as_published(vision: VisionConfig) -> VisionConfig:
    """The shape that is left of a tower when it is trained: fixed positions are a table like another, which the library
    resamples as it does, and there is no mask token and no drop path."""
    options = {"has_mask_token": False, "drop_path": 0.0, "drop_path_uniform": False, "antialias": False}
    return replace(vision, positions="learned", **options)


def save_vit(tower: Tower, folder: Path | str) -> None:
    """Writes a tower as a folder of transformers' ViTModel; a ValueError where it exists, or of a shape that ViTModel
    cannot have, such as registers."""
    config = ViTConfig(as_published(tower.config))
    model: Any = ViTModel(config)
    model.visual.load_state_dict({name: x for name, x in tower.state.items() if name != "mask_token"})
    FOLDER.save(model, folder)


def save_classifier(model: ViTClassifier, folder: Path | str, format: str) -> None:
    """Writes a new folder of transformers' ViTForImageClassification ("hf"), or of timm ("timm"), which
    `timm.create_model("local-dir:FOLDER")` reads; a ValueError where it exists, or of a shape that is not there."""
    config = replace(model.config, vision=as_published(model.config.vision))
    if format == "timm":
        settings = timm_settings(config.vision, config.pool, config.classes)
        layout = timm_layout(config)
        save_folder("save_timm", folder, settings, layout.write(model.state_dict()))
        return
    what = "pool must be 'class', the class token, which transformers' ViTForImageClassification reads, got {!r}: "
    require("save_vit", config.pool == "class", what + "--format timm has it", config.pool)
    with torch.device("meta"):
        plain = ViTClassifier(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    CLASSIFIER_FOLDER.save(plain, folder)


def timm_layout(config: ClassifierConfig) -> Layout:
    """timm's names of a classifier."""
    rows = {f"visual.{name}": theirs for name, theirs in tower_rows(config.pool).items()}
    return Layout({**rows, "head": "head"}, what="a file of timm")
