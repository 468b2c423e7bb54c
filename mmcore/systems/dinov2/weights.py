"""DINOv2's towers as transformers' Dinov2Model and Dinov2WithRegistersModel have them in their files."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmcore.nn import interpolate_positions
from mmcore.ops import require
from mmcore.parts.vit import Tower
from mmcore.parts.vit_names import VIT_BLOCK, VIT_SETTINGS, VIT_TOWER
from mmcore.systems.vit.model import ViTConfig, ViTModel
from mmcore.systems.vit.shapes import vit_vision
from mmcore.weights.files import read_folder, read_json
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout, leading, under
from mmcore.weights.pictures import FILE
from mmcore.weights.settings import Key, Settings

_WIDTH, _SWIGLU = "vision.width", "vision.has_swiglu"


def _mlp_dim(ratio: float, ours: Mapping[str, Any]) -> int:
    """Of a gated feed-forward two thirds, a multiple of 8."""
    hidden = int(ours[_WIDTH] * ratio)
    return -(-int(hidden * 2 / 3) // 8) * 8 if ours[_SWIGLU] else hidden


def _ratio(mlp_dim: int, ours: Mapping[str, Any]) -> int:
    """The nearest, which a round trip tells from one that is exact."""
    return round(mlp_dim * (1.5 if ours[_SWIGLU] else 1) / ours[_WIDTH])


def _folder(
    name: str, model_type: str, kind: str, patch_size: int, more: Mapping[str, Key], **fixed: Any
) -> ModelFolder:
    options: dict[str, Any] = {"has_mask_token": True, "layer_scale": 1.0, **fixed}
    keys = {f"vision.{n}": key for n, key in VIT_SETTINGS.items() if n not in ("mlp_dim", "norm_eps", "patch_size")}
    keys |= {
        "vision.patch_size": Key("patch_size", patch_size),
        "vision.norm_eps": Key("layer_norm_eps", 1e-6),
        "vision.layer_scale": Key("layerscale_value", 1.0),
        _SWIGLU: Key("use_swiglu_ffn", False),
        "vision.mlp_dim": Key("mlp_ratio", 4, _mlp_dim, _ratio),
        **more,
    }
    settings = Settings(
        keys,
        kind=ViTConfig,
        kinds={"vision": partial(vit_vision, **options)},
        model_types=(model_type,),
        must={"qkv_bias": True, "num_channels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
              "use_mask_token": True},
        written={"architectures": [kind], "model_type": model_type, "dtype": "float32"},
    )  # fmt: skip
    return ModelFolder(name, ViTModel, settings, LAYOUT)


_BLOCK = {
    **{ours: theirs for ours, theirs in VIT_BLOCK.items() if not ours.startswith(("norm", "mlp"))},
    "norm1": "norm1",
    "norm2": "norm2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
LAYOUT = Layout(
    {
        f"visual.{ours}": theirs
        for ours, theirs in {
            **{ours: theirs for ours, theirs in VIT_TOWER.items() if not ours.startswith("transformer")},
            "mask_token": leading("embeddings.mask_token", 1),
            "registers": leading("embeddings.register_tokens", 1),
            **under("transformer.blocks.{i}", "encoder.layer.{i}", _BLOCK),
        }.items()
    },
    unread=("classifier",),
    older=(("dinov2.", ""), ("dinov2_with_registers.", "")),
)
PLAIN = _folder("dinov2", "dinov2", "Dinov2Model", 14, {})
WITH_REGISTERS = _folder(
    "dinov2", "dinov2_with_registers", "Dinov2WithRegistersModel", 16,
    {"vision.num_registers": Key("num_register_tokens", 4)}, antialias=True,
)  # fmt: skip


def load_dinov2(folder: Path | str) -> ViTModel:
    """Reads the tower of a folder of transformers' Dinov2Model or Dinov2WithRegistersModel.

    The published folders have positions for 518 pixels and show 224 of the 256 that a picture is resized to: then the
    tower is of 224 pixels, its positions resampled as there, and pictures are resized to 224. A ValueError of another
    model, and as `ModelFolder.load`.
    """
    op, folder = "load_dinov2", Path(folder)
    raw = read_json(op, folder / "config.json")
    kind = WITH_REGISTERS if raw.get("model_type") == "dinov2_with_registers" else PLAIN
    shown = read_json(op, folder / FILE) if (folder / FILE).is_file() else {}
    edge, crop = (
        (shown.get(name) or {}).get(side, 0) for name, side in (("size", "shortest_edge"), ("crop_size", "height"))
    )
    if not 0 < crop < edge:
        return kind.load(folder)
    vision = kind.settings.read(op, raw).vision
    fits = crop % vision.patch_size == 0 and shown.get("resample", 3) == Image.Resampling.BICUBIC
    require(op, fits, "{} must have crops of whole patches, bicubic, got {}", folder / FILE, shown)
    with torch.device("meta"):
        wanted = ViTModel(ViTConfig(vision)).state_dict()
    state = kind.layout.read(op, read_folder(op, folder), wanted)
    numbers = {name: tuple(shown[name]) for name in ("image_mean", "image_std")}
    vision, name = replace(vision, image_size=crop, **numbers), "visual.position_embedding"
    state[name] = interpolate_positions(state[name], vision.num_patches, antialias=vision.antialias)
    with torch.device("meta"):
        model = ViTModel(ViTConfig(vision))
    model.load_state_dict(state, assign=True)
    return model


def save_dinov2(tower: Tower, folder: Path | str) -> None:
    """Writes a tower, with its mask token, as a folder of transformers' Dinov2Model, of Dinov2WithRegistersModel where
    it has registers; a ValueError where it exists, or of a shape that these cannot have."""
    kind = WITH_REGISTERS if tower.config.num_registers else PLAIN
    options = {"drop_path": 0.0, "drop_path_uniform": False, "antialias": kind is WITH_REGISTERS}
    model = ViTModel(ViTConfig(replace(tower.config, **options)))
    model.visual.load_state_dict(tower.state)
    kind.save(model, folder)
