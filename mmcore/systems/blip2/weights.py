"""BLIP-2's weights on disk, in the layout of transformers' Blip2ForImageTextRetrieval."""

from pathlib import Path

import torch

from mmcore.parts.vit import Tower, ViT
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.names import HF, PARTS_SETTINGS, STAGE1_SETTINGS
from mmcore.weights.files import read_folder, read_json, save_folder


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
    model = BLIP2(STAGE1_SETTINGS.read(op, read_json(op, folder / "config.json")))
    state = model.state_dict()
    model.load_state_dict(state | HF.read(op, read_folder(op, folder), state))
    return model


def load_blip2_tower(folder: Path | str) -> Tower:
    """The image tower, float32 on the CPU, in a folder of transformers or ours with a BLIP-2 of either stage.

    Raises:
        ValueError: no such folder, a damaged file, missing or unknown names, wrong shapes.
    """
    folder, op = Path(folder), "load_tower"
    config = PARTS_SETTINGS.read(op, read_json(op, folder / "config.json"))["vision"]
    with torch.device("meta"):
        wanted = ViT(config).state_dict(prefix="visual.")
    theirs = {n: x for n, x in read_folder(op, folder).items() if n.startswith("vision_model.")}
    state = HF.read(op, theirs, wanted, unread=["vision_model.post_layernorm"])
    return Tower(config, {name.removeprefix("visual."): x for name, x in state.items()})


def save_blip2(model: BLIP2, folder: Path | str) -> None:
    """Writes a new folder that transformers' Blip2ForImageTextRetrieval.from_pretrained loads.

    What transformers has not, the captions' head and the temperature, is in it under our names.

    Args:
        model: whose configuration and weights are written.
        folder: must not exist yet; its parents are made.

    Raises:
        ValueError: an existing folder; a tower or sizes that transformers' BLIP-2 cannot have.
    """
    op = "save_blip2"
    save_folder(op, folder, STAGE1_SETTINGS.write(op, model.config), HF.write(model.state_dict()))
