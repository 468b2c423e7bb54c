"""BLIP-2's weights on disk, in the layout of transformers' Blip2ForImageTextRetrieval."""

from pathlib import Path

from mmcore.checkpoint import write_json
from mmcore.systems.blip2 import names as blip2_names
from mmcore.systems.blip2.model import BLIP2
from mmcore.weights.files import new_folder, read_folder, read_json, write_weights


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
    config = blip2_names.config_from_hf(read_json(op, folder / "config.json"))
    tensors = read_folder(op, folder)
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
    config = blip2_names.hf_config(model.config)
    with new_folder("save_blip2", Path(folder)) as staged:
        write_weights(staged, blip2_names.to_hf(model.state_dict(), model.config))
        write_json(staged / "config.json", config)
