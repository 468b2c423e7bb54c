"""CLIP weights on disk, in the layouts of transformers and of open_clip; pickled code is never run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmcore.checkpoint import write_json
from mmcore.nn import interpolate_positions
from mmcore.ops import require
from mmcore.parts.vit import VisionConfig
from mmcore.systems.clip import names
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig, TowersConfig
from mmcore.weights.files import new_folder, read_folder, read_json, read_pickle, read_safetensors, write_safetensors
from mmcore.weights.pictures import with_pictures, write_pictures

Format = Literal["hf", "open_clip"]


# how they are written, and what their files' names begin with
_FORMATS = {
    "hf": (names.HF, names.HF_SETTINGS, ""),
    "open_clip": (names.OPEN_CLIP, names.OPEN_CLIP_SETTINGS, "open_clip_"),
}


def load_clip(path: str | Path, *, config: CLIPConfig | None = None, image_size: int | None = None) -> CLIP:
    """Load CLIP, float32 on the CPU, from a folder or file of transformers or open_clip.

    Args:
        path: a folder as either library writes it (configuration and .safetensors, one or, of transformers, several,
            or .bin), or one weights file (.safetensors, .bin, .pt, .pth).
        config: the shape of the weights, for a file that has no configuration beside it; it wins over one.
        image_size: pixels a side of the images to come; where the weights have another, position embeddings
            are interpolated.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: no weights or no configuration found, missing or unknown names, wrong shapes, a file that
            is damaged or that holds pickled code.
    """
    op, file = "load_clip", find_weights(Path(path))
    readers = {".safetensors": read_safetensors, ".json": lambda op, file: read_folder(op, file.parent)}
    tensors = readers.get(file.suffix, read_pickle)(op, file)
    ours = ["visual.class_embedding"]
    found = [x for x in _FORMATS.values() if next(x[0].pairs(ours)).theirs[0] in x[0].renamed(tensors)]
    if not found and config is None:  # what lies beside them may tell what they are
        for _, settings, _ in _FORMATS.values():
            if (file.parent / settings.what).is_file():
                settings.read(op, read_json(op, file.parent / settings.what))
    what = "{} must hold CLIP weights of transformers or open_clip, got neither's names"
    require(op, bool(found), what, file)
    layout, settings, _ = found[0]
    beside = file.parent / settings.what
    what = "{} must lie beside the weights, or config be given; {} is not there"
    require(op, config is not None or beside.is_file(), what, beside.name, beside)
    shape: CLIPConfig = config or settings.read(op, read_json(op, beside))
    # in OpenAI's own files alone, which tell no activation
    is_openais, activation = "input_resolution" in tensors, shape.vision.activation
    what = "config must have the activation of OpenAI's weights, quick_gelu (ViT-B-32-quickgelu), got {} for {}"
    require(op, not is_openais or activation == "quick_gelu", what, activation, file)
    if layout is names.HF:
        shape = replace(shape, vision=with_pictures(op, file.parent, shape.vision))
    state = layout.read(op, tensors, _empty_clip(shape).state_dict())
    if image_size is not None and image_size != shape.vision.image_size:
        shape = replace(shape, vision=replace(shape.vision, image_size=image_size))
        positions = interpolate_positions(state["visual.position_embedding"], shape.vision.num_patches)
        state["visual.position_embedding"] = positions
    model = _empty_clip(shape)
    model.load_state_dict(state, assign=True)
    return model


def has_settings(folder: Path) -> bool:
    """Whether a configuration of either library lies in a folder."""
    return any((folder / settings.what).is_file() for _, settings, _ in _FORMATS.values())


def load_folder(folder: Path, *, dtype: torch.dtype | None = None) -> CLIP:
    """`load_clip`, as every system's folders are read; its weights are float32 whatever `dtype` is."""
    return load_clip(folder)


def save_clip(
    model: CLIP, folder: str | Path, *, format: Format = "hf", state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write a folder, whole or not at all, that transformers' `CLIPModel.from_pretrained` or open_clip's `local-dir:`
    loads.

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
    op, own = "save_clip", _empty_clip(model.config).state_dict()
    require(op, format in _FORMATS, "format must be one of {}, got {!r}", sorted(_FORMATS), format)
    state = model.state_dict() if state_dict is None else state_dict
    odd = sorted(set(state) ^ set(own))
    require(op, not odd, "state_dict must hold the model's names, differs in {}", ", ".join(odd[:3]))
    for name, x in own.items():
        shape, got = list(x.shape), list(state[name].shape)
        require(op, shape == got, "{} must be {}, got {}", name, shape, got)
    config, state = _as_clip(op, model.config, state)
    layout, settings, start = _FORMATS[format]
    tensors, raw = layout.write(state), settings.write(op, config)
    with new_folder(op, Path(folder)) as staged:
        write_safetensors(staged / f"{start}model.safetensors", tensors)
        write_json(staged / settings.what, raw)
        if format == "hf":
            write_pictures(staged, config.vision.preprocess)


def _as_clip(op: str, config: TowersConfig, state: Mapping[str, Tensor]) -> tuple[CLIPConfig, Mapping[str, Tensor]]:
    """Any two towers as a CLIP's; a ValueError where they are not."""
    vision, text, what = config.vision, config.text, "the {} tower must be CLIP's to be written as a CLIP, got {}"
    require(op, isinstance(vision, VisionConfig), what, "image", vision.summary)
    require(op, isinstance(text, TextConfig), what, "text", text.summary)
    assert isinstance(vision, VisionConfig) and isinstance(text, TextConfig)
    if not config.has_image_proj:
        state = {**state, "visual.proj.weight": torch.eye(config.embed_dim)}
    return CLIPConfig(config.embed_dim, vision, text, config.init_log_logit_scale, config.image_pool), state


def find_weights(path: Path) -> Path:
    """The file of weights of a folder, or the file itself; a ValueError where there is none."""
    known = (".safetensors", ".bin", ".pt", ".pth")
    is_known = not path.is_file() or path.suffix in known
    require("load_clip", is_known, "path must end in {}, {}, {} or {}, got {}", *known, path.name)
    kinds = ("model.safetensors", "pytorch_model.bin")
    files = [path / f"{start}{kind}" for kind in kinds for _, _, start in _FORMATS.values()]
    found = [file for file in (path, *files, path / "model.safetensors.index.json") if file.is_file()]
    what = "path must be a weights file or a folder with one of {}, such as mmcore export writes of a run, got {}"
    require("load_clip", bool(found), what, ", ".join(file.name for file in files), path)
    return found[0]


def _empty_clip(config: TowersConfig) -> CLIP:
    with torch.device("meta"):
        return CLIP(config)
