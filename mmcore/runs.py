"""Models read back from the runs that trained them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from mmcore import checkpoint
from mmcore.parts.vit import VisionConfig
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig

BLIP2_STAGE1, BLIP2_STAGE2 = "blip2-stage1", "blip2-stage2"
LLAVA_STAGE1, LLAVA_STAGE2 = "llava-stage1", "llava-stage2"
FROZEN = "frozen.safetensors"
"""What a run does not train, written once into its folder."""

WeightsKey = Literal["auto", "ema", "weight"]
WEIGHTS = {"ema": "the averaged weights (EMA)", "weight": "the weights"}
"""What a checkpoint's tensors are, by the key that they are stored under."""


@dataclass(frozen=True)
class SavedRun:
    """A run's newest checkpoint, or the one that was named.

    Args:
        folder: the run's.
        checkpoint: the checkpoint's.
        key: "ema" or "weight", under which the chosen weights are stored.
        recipe: which one it is of.
        saved: its config.json.
    """

    folder: Path
    checkpoint: Path
    key: str
    recipe: str
    saved: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return json.loads((self.checkpoint / "state.json").read_text())["step"]


def find_run(where: Path, weights: WeightsKey = "auto") -> SavedRun:
    """Finds and verifies a checkpoint.

    Args:
        where: a run's folder, or a checkpoint of it.
        weights: "ema" for the averaged weights, "weight" for the trained ones, "auto" for the former where the run
            kept them.

    Raises:
        ValueError: no checkpoint, or a damaged one.
    """
    if not where.exists():
        raise ValueError(
            f"RUN must be a run's folder or one of its checkpoints, got {where}, which does not exist"
        )
    found = checkpoint.find(where)
    checkpoint.verify(found)
    folder = found.parents[1]
    saved = json.loads((folder / "config.json").read_text())
    key = ("ema" if any(found.glob("ema-*.safetensors")) else "weight") if weights == "auto" else weights
    return SavedRun(folder, found, key, saved["recipe"], saved)


def clip_of(run: SavedRun) -> CLIP:
    """The CLIP that a run trained.

    Raises:
        ValueError: a run of another recipe, or no such weights in it.
    """
    if run.recipe != "clip":
        raise ValueError(f"RUN must be of mmcore train clip, got {run.folder}, which is of {run.recipe}")
    shape = run.saved["model"]
    config = CLIPConfig(
        **{**shape, "vision": VisionConfig(**shape["vision"]), "text": TextConfig(**shape["text"])}
    )
    model = CLIP(config)
    model.load_state_dict(dict(checkpoint.tensors(run.checkpoint, run.key)))
    return model


def is_run(where: Path) -> bool:
    """Whether a folder is a run's or one of its checkpoints."""
    return (where / "checkpoints").is_dir() or (where / checkpoint.MANIFEST).is_file()


def blip2_shape(saved: dict[str, Any]) -> BLIP2Config:
    """A configuration as a run's config.json holds it."""
    parts = {"vision": VisionConfig(**saved["vision"]), "qformer": QFormerConfig(**saved["qformer"])}
    return BLIP2Config(**{**saved, **parts})


def blip2_of(run: SavedRun) -> BLIP2:
    """The BLIP-2 of stage 1 that a run trained, with the tower that it left as it was.

    Raises:
        ValueError: a run of another recipe, or no such weights in it.
    """
    if run.recipe != BLIP2_STAGE1:
        raise ValueError(
            f"RUN must be of mmcore train blip2-stage1, got {run.folder}, which is of {run.recipe}"
        )
    model = BLIP2(blip2_shape(run.saved["model"]))
    state = dict(checkpoint.tensors(run.checkpoint, run.key))
    if (run.folder / FROZEN).is_file():
        state |= load_file(run.folder / FROZEN)
    model.load_trained(state)
    return model
