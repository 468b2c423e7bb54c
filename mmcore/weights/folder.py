"""A model's folder as transformers has it: config.json and safetensors, read and written by the same two tables."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcore.weights.files import read_folder, read_json, save_folder
from mmcore.weights.layout import Layout
from mmcore.weights.pictures import with_pictures, write_pictures
from mmcore.weights.settings import Settings


@dataclass(frozen=True)
class ModelFolder:
    """How one kind of model, with the image tower `config.vision`, is loaded and saved, with what its image processor
    does to pictures; errors name `load_NAME` and `save_NAME`."""

    name: str
    build: Callable[[Any], nn.Module]  # of what `settings` reads, which the model has as `config`
    settings: Settings
    layout: Layout

    def load(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> Any:
        """The model in a folder, in training mode, in float32 on the CPU whatever `dtype` is; a ValueError without such
        a folder, of a damaged file, missing or unknown names, wrong shapes, and as of `with_pictures`."""
        op, folder = f"load_{self.name}", Path(folder)
        config = self.settings.read(op, read_json(op, folder / "config.json"))
        config = replace(config, vision=with_pictures(op, folder, config.vision))
        with torch.device("meta"):
            model = self.build(config)
        model.load_state_dict(self.layout.read(op, read_folder(op, folder), model.state_dict()), assign=True)
        return model

    def save(self, model: Any, folder: Path | str) -> None:
        """Writes a new folder that transformers' `from_pretrained` loads; a ValueError where it exists already, and of
        a shape that transformers' model cannot have."""
        op, preprocess = f"save_{self.name}", model.config.vision.preprocess
        config, weights = self.settings.write(op, model.config), self.layout.write(model.state_dict())
        save_folder(op, folder, config, weights, lambda staged: write_pictures(staged, preprocess))
