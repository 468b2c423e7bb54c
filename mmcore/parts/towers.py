"""Image towers for models that read one: of a CLIP, of a run that trained one, of a BLIP-2."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mmcore.parts.vit import VisionConfig, ViT
from mmcore.runs import clip_of, find_run, is_run
from mmcore.systems.blip2 import names as blip2_names
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.weights import load_clip
from mmcore.weights.files import read_folder, read_json


class Tower(NamedTuple):
    """The shape of a ViT and its weights by their names in it."""

    config: VisionConfig
    state: dict[str, Tensor]


def load_tower(path: Path) -> Tower:
    """Reads an image tower.

    Of a CLIP the last layer is left out, as LAVIS and LLaVA do: nothing trained what it makes of patches.

    Args:
        path: a run of `mmcore train clip`; a folder or file of transformers or open_clip with a CLIP; or a folder of
            transformers with a BLIP-2 (safetensors), whose tower is taken as it is.

    Raises:
        ValueError: nothing of this kind.
    """
    if is_run(path):
        return _of_clip(clip_of(find_run(path)))
    config = path / "config.json"
    if config.is_file() and read_json("load_tower", config).get("model_type") == "blip-2":
        return _of_blip2(path)
    return _of_clip(load_clip(path))


def _of_clip(clip: CLIP) -> Tower:
    if clip.config.vision.num_layers < 2:
        raise ValueError(
            f"load_tower: a CLIP's tower must have 2 layers or more, got {clip.config.vision.num_layers}"
        )
    config = replace(clip.config.vision, num_layers=clip.config.vision.num_layers - 1)
    wanted = ViT(config).state_dict().keys()
    return Tower(config, {name: x for name, x in clip.visual.state_dict().items() if name in wanted})


def _of_blip2(folder: Path) -> Tower:
    op = "load_tower"
    config, _ = blip2_names.parts_from_hf(op, read_json(op, folder / "config.json"))
    return Tower(config, blip2_names.tower_from_hf(read_folder(op, folder), config))
