"""LLaVA read back from the runs that trained it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.models.language import load_language_model
from mmcore.models.language_folder import LANGUAGE_MODEL, language_model_folder
from mmcore.models.llava import Llava, LlavaConfig, Trainable
from mmcore.models.runs import FROZEN, SavedRun
from mmcore.models.vit import VisionConfig
from mmcore.ops import require

LLAVA_STAGE1, LLAVA_STAGE2 = "llava-stage1", "llava-stage2"


@dataclass(frozen=True)
class LlavaRun:
    """What a run of LLaVA starts or goes on from, but for the language model.

    Args:
        config: of tower, projector and tiles.
        state: weights by our names: the tower's, the projector's, and the language model's where it was trained.
        language: what the run knows of its language model.
    """

    config: LlavaConfig
    state: dict[str, Tensor]
    language: dict[str, Any]


def llava_shape(saved: dict[str, Any]) -> LlavaConfig:
    """A configuration as a run's config.json holds it."""
    pinpoints = tuple((height, width) for height, width in saved["grid_pinpoints"])
    return LlavaConfig(VisionConfig(**saved["vision"]), saved["projector"], pinpoints)


def read_llava(run: SavedRun) -> LlavaRun:
    """What is known of a run, its weights included.

    Raises:
        ValueError: a run of another recipe, or no such weights in it.
    """
    wanted = (LLAVA_STAGE1, LLAVA_STAGE2)
    what = "RUN must be of mmcore train {}, got {}, which is of {}"
    require("read_llava", run.recipe in wanted, what, " or ".join(wanted), run.folder, run.recipe)
    saved = dict(run.saved["model"])
    language = saved.pop(LANGUAGE_MODEL)
    state = dict(checkpoint.tensors(run.checkpoint, run.key))
    if (run.folder / FROZEN).is_file():
        state |= load_file(run.folder / FROZEN)
    return LlavaRun(llava_shape(saved), state, language)


def load_trained(model: Llava, state: dict[str, Tensor]) -> None:
    """Loads weights by name; the language model's may be missing, since it has some already.

    Raises:
        ValueError: missing or unknown names, or other shapes.
    """
    ours = model.state_dict()
    missing = [n for n in ours if n not in state and not n.startswith(("language_model.", "language_head."))]
    unknown = [n for n in state if n not in ours or state[n].shape != ours[n].shape]
    differ = [*missing, *unknown][:3]
    require("Llava", not differ, "weights must have its names and shapes, got a difference in {}", differ)
    model.load_state_dict(state, strict=False)


def llava_of(
    run: SavedRun,
    llm: Path | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    trainable: Trainable = "projector",
) -> Llava:
    """The LLaVA that a run trained.

    Args:
        run: a run.
        llm: where the language model that it started from is now; None = where it was.
        dtype: of the language model; None = as it is stored.
        trainable: what learns from here on.

    Raises:
        ValueError: a run of another recipe, no such weights in it, no such language model.
    """
    read = read_llava(run)
    folder = language_model_folder(run.folder, run.saved["model"], llm)
    language = load_language_model(folder, dtype=dtype)
    model = Llava(read.config, language, trainable=trainable)
    load_trained(model, read.state)
    return model
