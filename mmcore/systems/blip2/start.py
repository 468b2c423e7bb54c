"""BLIP-2's second stage read back from the runs that trained it, and what it starts from."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.parts.language import load_language_model, load_language_tokenizer
from mmcore.parts.language_folder import language_model_folder
from mmcore.parts.vit import VisionConfig
from mmcore.runs import BLIP2_STAGE2, FROZEN, SavedRun, WeightsKey, blip2_of, find_run, is_run
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.lm_weights import load_blip2_lm, save_blip2_lm
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.weights import load_blip2
from mmcore.weights.files import read_json


def blip2_lm_of(
    run: SavedRun, llm: Path | None = None, *, dtype: torch.dtype | None = torch.float32
) -> BLIP2LM:
    """The BLIP-2 of stage 2 that a run trained, with the tower and the language model that it left as they were.

    Args:
        run: a run.
        llm: where the language model is now; None = where it was.
        dtype: of the language model; None = as it is stored.

    Raises:
        ValueError: a run of another recipe, no such weights in it, no such language model.
    """
    if run.recipe != BLIP2_STAGE2:
        raise ValueError(
            f"RUN must be of mmcore train {BLIP2_STAGE2}, got {run.folder}, which is of {run.recipe}"
        )
    saved = run.saved["model"]
    folder = language_model_folder(run.folder, saved, llm)
    vision, qformer = VisionConfig(**saved["vision"]), QFormerConfig(**saved["qformer"])
    model = BLIP2LM(vision, qformer, load_language_model(folder, dtype=dtype))
    trained = dict(checkpoint.tensors(run.checkpoint, run.key))
    model.load_start(trained | load_file(run.folder / FROZEN))
    return model


class Stage2Start(NamedTuple):
    """What stage 2 starts from."""

    vision: VisionConfig
    qformer: QFormerConfig  # without text
    state: dict[str, Tensor]  # of the tower and the Q-Former; the language model's is not in it


def stage2_start(path: Path) -> Stage2Start:
    """Reads what stage 2 starts from.

    Args:
        path: a run of stage 1 or stage 2, or a folder of transformers with a Blip2ForImageTextRetrieval or a
            Blip2ForConditionalGeneration.

    Raises:
        ValueError: nothing of this kind.
    """
    if not is_run(path):
        return _start_in(path)
    run = find_run(path)
    if run.recipe != BLIP2_STAGE2:
        return _start_of(blip2_of(run))
    saved = run.saved["model"]
    state = dict(checkpoint.tensors(run.checkpoint, run.key)) | load_file(run.folder / FROZEN)
    return Stage2Start(VisionConfig(**saved["vision"]), QFormerConfig(**saved["qformer"]), state)


def _start_in(folder: Path) -> Stage2Start:
    if not has_language_model(folder):
        return _start_of(load_blip2(folder))
    model = load_blip2_lm(folder, dtype=None)
    state = {
        name: x
        for name, x in model.state_dict().items()
        if not name.startswith(("language_model", "language_head"))
    }
    return Stage2Start(model.visual.config, model.qformer.config, state)


def has_language_model(folder: Path) -> bool:
    """Whether a folder is of transformers' Blip2ForConditionalGeneration."""
    config = folder / "config.json"
    return config.is_file() and "Blip2ForConditionalGeneration" in (
        read_json("stage2_start", config).get("architectures") or ()
    )


def _start_of(blip2: BLIP2) -> Stage2Start:
    config = blip2.config
    return Stage2Start(config.vision, replace(config.qformer, has_text=False), blip2.state_dict())


def export(
    where: Path, out: Path, weights: WeightsKey = "auto", llm: Path | None = None
) -> tuple[int, int, str]:
    """Writes a run as a new folder of transformers' Blip2ForConditionalGeneration, the language model as it is stored.

    Returns:
        The image size, the step, and which weights they are, "ema" or "weight".

    Raises:
        ValueError: see `blip2_lm_of` and `save_blip2_lm`.
    """
    run = find_run(where, weights)
    model = blip2_lm_of(run, llm, dtype=None)
    tokenizer = load_language_tokenizer(language_model_folder(run.folder, run.saved["model"], llm))
    save_blip2_lm(model, out, tokenizer=tokenizer)
    return model.visual.config.image_size, run.step, run.key
