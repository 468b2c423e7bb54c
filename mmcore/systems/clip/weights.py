"""CLIP weights on disk, in the layouts of transformers and of open_clip; pickled code is never run."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmcore.checkpoint import write_json
from mmcore.nn import interpolate_positions
from mmcore.systems.clip import names as clip_names
from mmcore.systems.clip.model import CLIP, CLIPConfig
from mmcore.weights.files import new_folder, read_json, read_safetensors, write_safetensors

Format = Literal["hf", "open_clip"]


@dataclass(frozen=True)
class _Layout:
    config: str
    safetensors: str
    pickled: str


_LAYOUTS: dict[str, _Layout] = {
    "hf": _Layout("config.json", "model.safetensors", "pytorch_model.bin"),
    "open_clip": _Layout(
        "open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
    ),
}
_MARKS = {"hf": "vision_model.embeddings.class_embedding", "open_clip": "visual.conv1.weight"}


def load_clip(path: str | Path, *, config: CLIPConfig | None = None, image_size: int | None = None) -> CLIP:
    """Load CLIP, float32 on the CPU, from a folder or file of transformers or open_clip.

    Args:
        path: a folder as either library writes it (configuration and .safetensors or .bin), or one weights
            file (.safetensors, .bin, .pt, .pth).
        config: the shape of the weights, for a file that has no configuration beside it; it wins over one.
        image_size: pixels a side of the images to come; where the weights have another, position embeddings
            are interpolated.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: no weights or no configuration found, missing or unknown names, wrong shapes, a file that
            is damaged or that holds pickled code.
    """
    file = _find_weights(Path(path))
    tensors = _read_tensors(file)
    plain = {name.removeprefix("module.") for name in tensors}
    layout = next((name for name, mark in _MARKS.items() if mark in plain), None)
    if layout is None:
        raise ValueError(
            f"load_clip: {file} must hold CLIP weights of transformers or open_clip, got neither's names"
        )
    if config is None:
        config = _read_config(file.parent / _LAYOUTS[layout].config, layout)
    ours = (clip_names.from_hf if layout == "hf" else clip_names.from_open_clip)(tensors, config)
    _check_shapes("load_clip", ours, config)
    if image_size is not None and image_size != config.vision.image_size:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
        positions = interpolate_positions(ours["visual.position_embedding"], config.vision.num_patches)
        ours["visual.position_embedding"] = positions
    model = _empty_clip(config)
    model.load_state_dict(ours, assign=True)
    return model


def save_clip(
    model: CLIP,
    folder: str | Path,
    *,
    format: Format = "hf",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a new folder that transformers' `CLIPModel.from_pretrained` or open_clip's `local-dir:` loads.

    The folder appears complete or not at all.

    Args:
        model: whose configuration, and weights, are written.
        folder: must not exist yet; its parents are made.
        format: "hf" or "open_clip".
        state_dict: weights to write in place of the model's, under its names: an average, or the gathered
            weights of a sharded model.

    Raises:
        ValueError: an existing folder, an unknown format, weights of other names or shapes, a configuration
            that the format cannot express.
    """
    folder = Path(folder)
    if format not in _LAYOUTS:
        raise ValueError(f"save_clip: format must be one of {sorted(_LAYOUTS)}, got {format!r}")
    state = {
        name: t.detach() for name, t in (model.state_dict() if state_dict is None else state_dict).items()
    }
    _check_shapes("save_clip", state, model.config)
    if format == "hf":
        tensors, raw = clip_names.to_hf(state, model.config), clip_names.hf_config(model.config)
    else:
        tensors, raw = clip_names.to_open_clip(state, model.config), clip_names.open_clip_config(model.config)
    layout = _LAYOUTS[format]
    with new_folder("save_clip", folder) as staged:
        write_safetensors(staged / layout.safetensors, tensors)
        write_json(staged / layout.config, raw)


def _find_weights(path: Path) -> Path:
    if path.is_file():
        return path
    names = [layout.safetensors for layout in _LAYOUTS.values()] + [
        layout.pickled for layout in _LAYOUTS.values()
    ]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"load_clip: path must be a weights file or a folder with one of {', '.join(names)}, got {path}"
    )


def _read_config(file: Path, layout: str) -> CLIPConfig:
    if not file.is_file():
        raise ValueError(
            f"load_clip: {file.name} must lie beside the weights, or config be given; {file} is not there"
        )
    raw = read_json("load_clip", file)
    return (clip_names.config_from_hf if layout == "hf" else clip_names.config_from_open_clip)(raw)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_safetensors("load_clip", file)
    if file.suffix not in (".bin", ".pt", ".pth"):
        raise ValueError(f"load_clip: path must end in .safetensors, .bin, .pt or .pth, got {file.name}")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise ValueError(
                    f"load_clip: {file} must hold plain tensors, got a TorchScript archive (code)"
                )
    try:
        raw = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_clip: {file} must hold plain tensors, got pickled objects, which could run code"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"load_clip: {file} must be a whole torch file, got: {error}") from error
    # open_clip's trainer keeps the weights beside the optimizer
    if isinstance(raw, dict) and isinstance(raw.get("state_dict"), dict):
        raw = raw["state_dict"]
    if not isinstance(raw, dict) or not all(isinstance(t, Tensor) for t in raw.values()):
        raise ValueError(f"load_clip: {file} must hold a dict of tensors, got {type(raw).__name__}")
    return raw


def _empty_clip(config: CLIPConfig) -> CLIP:
    with torch.device("meta"):
        return CLIP(config)


def _check_shapes(caller: str, state: Mapping[str, Tensor], config: CLIPConfig) -> None:
    wanted = {name: tuple(t.shape) for name, t in _empty_clip(config).state_dict().items()}
    if set(state) != set(wanted):
        odd = sorted(set(state) ^ set(wanted))
        raise ValueError(f"{caller}: state_dict must hold the model's names, differs in {', '.join(odd[:3])}")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{caller}: {name} must be {list(shape)}, got {list(state[name].shape)}")
