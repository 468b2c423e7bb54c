"""BLIP-2's weights on disk, in the layout of transformers' Blip2ForImageTextRetrieval."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmcore.models import blip2_names
from mmcore.models.blip2 import BLIP2
from mmcore.models.clip_weights import write_model
from mmcore.ops import require


def load_blip2(folder: Path | str) -> BLIP2:
    """Loads BLIP-2's first stage, float32 on the CPU, from a folder that transformers or `save_blip2` wrote.

    The captions' head and the temperature, which transformers has not, start anew where they are not there.

    Args:
        folder: with config.json and *.safetensors.

    Returns:
        The model, in training mode, its image tower frozen.

    Raises:
        ValueError: no such folder, a damaged file, missing or unknown names, a Q-Former without a text branch.
    """
    folder, op = Path(folder), "load_blip2"
    file = folder / "config.json"
    require(op, file.is_file(), "folder must hold config.json, got {}", folder)
    config = blip2_names.config_from_hf(json.loads(file.read_text(encoding="utf-8")))
    tensors: dict[str, Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(part)
        except SafetensorError as error:
            raise ValueError(f"{op}: {part} must be a whole safetensors file, got: {error}") from error
    model = BLIP2(config)
    state = {name: x for name, x in model.state_dict().items() if name != "text_head.weight"}
    model.load_trained(state | blip2_names.from_hf(tensors, config))
    return model


def save_blip2(model: BLIP2, folder: Path | str) -> None:
    """Writes a new folder that transformers' Blip2ForImageTextRetrieval.from_pretrained loads.

    What transformers has not, the captions' head and the temperature, is in it under our names.

    Args:
        model: whose configuration and weights are written.
        folder: must not exist yet; its parents are made.

    Raises:
        ValueError: an existing folder; a tower or sizes that transformers' BLIP-2 cannot have.
    """
    folder, op, vision = Path(folder), "save_blip2", model.config.vision
    require(op, not folder.exists(), "folder must not exist yet, got {}", folder)
    is_eva = vision.has_patch_bias and not vision.has_norm_pre and vision.activation == "gelu"
    require(op, is_eva, "model must have EVA's tower, got {}", "a CLIP's, which transformers' BLIP-2 has not")
    state = blip2_names.to_hf(model.state_dict(), model.config)
    write_model(folder, state, blip2_names.hf_config(model.config))
