"""A trained classifier that another learns from (arXiv 1503.02531)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.runs import read_run
from mmcore.systems.vit.model import ClassifierConfig

TEACHER = "teacher"


class Teacher(nn.Module):
    """A run's classifier outside of the engine: in evaluation mode, without gradients, and no part of a checkpoint."""

    def __init__(self, run: Path, device: torch.device) -> None:
        super().__init__()
        trained: Any = read_run(run)
        able = trained.recipe.classifies(trained.assets, trained.model.to(device), device)
        self._logits = (able.logits,)  # a tuple, so that its weights are no part of this module

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to logits [B, C]."""
        return self._logits[0](images)


def check_teacher(run: Path, shape: ClassifierConfig) -> None:
    """Raises a ValueError unless a run classifies images of this size into these classes, in this order."""
    trained: Any = read_run(run)
    can, name = hasattr(trained.recipe, "classifies"), trained.run.recipe
    if not can:
        raise ValueError(f"--teacher must be a run of a recipe that classifies, got {run}, which is of {name}")
    able = trained.recipe.classifies(trained.assets, trained.model, torch.device("cpu"))
    if able.classes != shape.classes:
        theirs, ours = (f"{len(x)} ({', '.join(x[:3])}, ...)" for x in (able.classes, shape.classes))
        raise ValueError(f"--teacher must have the classes of --data in their order, {ours}, got {theirs} in {run}")
    size = able.preprocess.size
    if size != shape.vision.image_size:
        raise ValueError(f"--teacher must read images of {shape.vision.image_size} pixels, got {size} in {run}")
