"""What BLIP-2's stages start from: an image tower, a run, a folder of transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmcore import checkpoint
from mmcore.parts.language_weights import beside_language
from mmcore.parts.vit import VisionConfig
from mmcore.runs import find_run, is_run, read_frozen, read_run
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.weights import load_blip2, load_blip2_lm
from mmcore.weights.files import read_json

STAGE1, STAGE2 = "blip2-stage1", "blip2-stage2"


class Stage2Start(NamedTuple):
    """What stage 2 starts from."""

    vision: VisionConfig
    qformer: QFormerConfig  # without text
    state: dict[str, Tensor]  # of the tower and the Q-Former; the language model's is not in it


def stage2_start(path: Path) -> Stage2Start:
    """Reads what stage 2 starts from: a run of stage 1 or stage 2, or a folder of transformers with a
    Blip2ForImageTextRetrieval or a Blip2ForConditionalGeneration; a ValueError for anything else."""
    run = find_run(path) if is_run(path) else None
    if run is not None and run.recipe not in (STAGE1, STAGE2):
        raise ValueError(f"--from must be a run of {STAGE1} or {STAGE2}, got one of {run.recipe}, {path}")
    if run is not None and run.recipe == STAGE2:
        saved = run.saved["model"]
        state = dict(checkpoint.tensors(run.checkpoint, run.key)) | read_frozen(run.folder)
        return Stage2Start(VisionConfig(**saved["vision"]), QFormerConfig(**saved["qformer"]), state)
    model: Any = load_folder(path) if run is None else read_run(path).model
    return Stage2Start(model.visual.config, replace(model.qformer.config, has_text=False), beside_language(model))


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A BLIP-2 of transformers: a `BLIP2LM` where it has a language model, in `dtype` or as it is stored, else a
    `BLIP2`; errors as of `load_blip2` and `load_blip2_lm`."""
    return load_blip2_lm(folder, dtype=dtype) if has_language_model(folder) else load_blip2(folder)


def has_language_model(folder: Path) -> bool:
    """Whether a folder is of transformers' Blip2ForConditionalGeneration."""
    config = folder / "config.json"
    kinds = read_json("stage2_start", config).get("architectures") if config.is_file() else None
    return "Blip2ForConditionalGeneration" in (kinds or ())
