"""LLaVA read back from the runs that trained it."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.ops import require
from mmcore.parts.language import load_language_model, load_language_tokenizer
from mmcore.parts.language_folder import language_model_folder
from mmcore.parts.vit import VisionConfig
from mmcore.runs import FROZEN, LLAVA_STAGE1, LLAVA_STAGE2, SavedRun, WeightsKey, find_run
from mmcore.systems.llava.model import Llava, LlavaConfig, Lora, Trainable, is_adapter
from mmcore.systems.llava.weights import save_llava

LORA = "lora"
"""Of a run's model: the shape of its language model's adapters."""


@dataclass(frozen=True)
class LlavaRun:
    """What a run of LLaVA starts or goes on from, but for the language model's own folder.

    Args:
        config: of tower, projector and tiles.
        lora: of the adapters, where these were trained.
        state: weights by our names: the tower's, the projector's, and what was trained of the language model.
    """

    config: LlavaConfig
    lora: Lora | None
    state: dict[str, Tensor]


def llava_shape(saved: dict[str, Any]) -> tuple[LlavaConfig, Lora | None]:
    """The model as a run's config.json holds it."""
    pinpoints = tuple((height, width) for height, width in saved["grid_pinpoints"])
    lora = saved[LORA]
    config = LlavaConfig(VisionConfig(**saved["vision"]), saved["projector"], pinpoints)
    return config, None if lora is None else Lora(**lora)


def read_llava(run: SavedRun) -> LlavaRun:
    """What is known of a run, its weights included.

    Raises:
        ValueError: a run of another recipe, or no such weights in it.
    """
    wanted = (LLAVA_STAGE1, LLAVA_STAGE2)
    what = "RUN must be of mmcore train {}, got {}, which is of {}"
    require("read_llava", run.recipe in wanted, what, " or ".join(wanted), run.folder, run.recipe)
    state = dict(checkpoint.tensors(run.checkpoint, run.key))
    if (run.folder / FROZEN).is_file():
        state |= load_file(run.folder / FROZEN)
    return LlavaRun(*llava_shape(run.saved["model"]), state)


def load_trained(model: Llava, lora: Lora | None, state: dict[str, Tensor]) -> Any:
    """Loads weights by name, and makes the adapters; those of the language model may be missing, it has some already.

    Args:
        model: without adapters.
        lora: of the adapters, None = it gets none.
        state: may hold the adapters' too; without them they are new.

    Returns:
        What `mmcore.parts.adapters.merge_adapters` takes, or None.

    Raises:
        ValueError: missing or unknown names, or other shapes.
    """
    adapters = {name: x for name, x in state.items() if is_adapter(name)}
    _load(model, {name: x for name, x in state.items() if name not in adapters})
    if lora is None:
        require("Llava", not adapters, "weights must hold no adapters, got {}", list(adapters)[:3])
        return None
    # loaded by name: peft takes seconds to import
    tuner = importlib.import_module("mmcore.parts.adapters").add_adapters(model, lora)
    if adapters:
        ours = {name for name in model.state_dict() if is_adapter(name)}
        missing = sorted(ours - adapters.keys())[:3]
        require("Llava", not missing, "weights must hold every adapter, missing {}", missing)
        _load(model, model.state_dict() | adapters)
    return tuner


def _load(model: Llava, state: dict[str, Tensor]) -> None:
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
    """The LLaVA that a run trained, what adapters learned added to the weights.

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
    stored = next(language.parameters()).dtype
    if read.lora is not None:  # sums of small numbers
        language.float()
    tuner = load_trained(model, read.lora, read.state)
    if tuner is not None:
        importlib.import_module("mmcore.parts.adapters").merge_adapters(tuner)
        language.to(stored)
        model.set_trainable(trainable)
    return model


def export(
    where: Path, out: Path, weights: WeightsKey = "auto", llm: Path | None = None
) -> tuple[LlavaConfig, int, str]:
    """Writes a run as a new folder of transformers' Llava- or LlavaNextForConditionalGeneration, with its processor but
    for the images' part; the language model in the dtype that it is stored in, what adapters learned added to it.

    Returns:
        The shape, the step, and which weights they are, "ema" or "weight".

    Raises:
        ValueError: see `llava_of` and `save_llava`.
    """
    run = find_run(where, weights)
    model = llava_of(run, llm, dtype=None)
    tokenizer = load_language_tokenizer(language_model_folder(run.folder, run.saved["model"], llm))
    save_llava(model, out, tokenizer=tokenizer)
    return model.config, run.step, run.key
