"""A ViT's weights and settings as transformers' ViTModel has them in its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcore.parts.vit import Tower, VisionConfig
from mmcore.parts.vit_names import VIT_SETTINGS, VIT_TOWER
from mmcore.systems.vit.model import ViTConfig, ViTModel
from mmcore.systems.vit.shapes import vit_vision
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout
from mmcore.weights.settings import Settings

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
load_vit = FOLDER.load


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
