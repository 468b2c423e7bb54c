"""A LLaVA to talk to, of a run or of a folder of transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mmcore.data.text.templates import AUTO, TEMPLATES, ChatTokens
from mmcore.parts.language import load_language_tokenizer
from mmcore.parts.language_folder import language_model_folder
from mmcore.runs import LLAVA_STAGE1, LLAVA_STAGE2, SavedRun, WeightsKey, find_run, is_run
from mmcore.systems.llava.model import Llava
from mmcore.systems.llava.runs import llava_of
from mmcore.systems.llava.weights import load_llava
from mmcore.weights.files import read_json

ASKED = [name for name, template in TEMPLATES.items() if not template.images_only]
"""Templates whose questions are read."""


@dataclass(frozen=True)
class ChatModel:
    """A LLaVA in evaluation mode, and its language model's tokens.

    Args:
        model: on a device, its language model in bfloat16 where that is a GPU.
        tokens: with the template that it was trained with.
        origin: what it was read from, for a person.
    """

    model: Llava
    tokens: ChatTokens
    origin: str


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def model_of_run(run: SavedRun, llm: Path | None = None, device: torch.device | None = None) -> ChatModel:
    """What a run of either stage trained.

    Args:
        run: a run.
        llm: where the language model that it started from is now; None = where it was.
        device: to put it on; None = the GPU where there is one.

    Raises:
        ValueError: a run of another recipe, no such weights in it, no language model.
    """
    device = device or default_device()
    model = llava_of(run, llm, dtype=_dtype(device))
    settings = run.saved["settings"]
    tokenizer = load_language_tokenizer(language_model_folder(run.folder, run.saved["model"], llm))
    tokens = ChatTokens(tokenizer, settings["template"], settings["max_length"])
    averaged = ", averaged" if run.key == "ema" else ""
    origin = f"{run.folder} at step {run.step}{averaged}"
    return ChatModel(model.eval().to(device), tokens, origin)


def model_of_folder(folder: Path, template: str | None, device: torch.device | None = None) -> ChatModel:
    """What transformers or `save_llava` wrote, with its tokenizer.

    Args:
        folder: a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.
        template: that it was trained with, "auto" for the tokenizer's own; None = the latter, if there is one.
        device: to put it on; None = the GPU where there is one.

    Raises:
        ValueError: no such folder, a model or tokenizer that ours is not, a template that it cannot have or that is
            not known.
    """
    device = device or default_device()
    choices = f"--template must say how {folder} was trained, by {AUTO}, {', '.join(ASKED)}"
    if template not in (None, AUTO, *ASKED):
        raise ValueError(f"{choices}, got {template!r}")
    tokenizer = load_language_tokenizer(folder)
    if template is None and not tokenizer.chat_template:
        raise ValueError(f"{choices}, since its tokenizer has no chat template, got nothing")
    try:
        # how long its conversations were is not known
        tokens = ChatTokens(tokenizer, template or AUTO, tokenizer.model_max_length)
    except ValueError as error:
        raise ValueError(f"{choices}, got {template or 'nothing'}: {error}") from None
    model = load_llava(folder, dtype=_dtype(device))
    return ChatModel(model.eval().to(device), tokens, str(folder))


def load_chat_model(
    where: Path,
    *,
    weights: WeightsKey = "auto",
    llm: Path | None = None,
    template: str | None = None,
    device: torch.device | None = None,
) -> ChatModel:
    """A LLaVA that answers questions.

    Args:
        where: a run of llava-stage1 or llava-stage2, a checkpoint of one, or a folder of transformers.
        weights: of a run, the averaged ones or not.
        llm: of a run, where the language model that it started from is now; None = where it was.
        template: of a folder, see `model_of_folder`; a run knows its own.
        device: to put it on; None = the GPU where there is one.

    Raises:
        ValueError: none of these, one that reads no questions, a setting that the other kind has, a damaged file.
    """
    config = where / "config.json"
    if is_run(where) or (config.is_file() and "recipe" in read_json("RUN", config)):
        run = find_run(where, weights)
        if template is not None:
            raise ValueError(f"--template has no effect on a run, which knows its own, got {template}")
        trained = run.saved["settings"].get("template", AUTO)
        if trained not in (AUTO, *ASKED):
            raise ValueError(
                f"RUN must have learned to answer questions, got {where}, which describes images alone "
                f"(template {trained}): train {LLAVA_STAGE2} from it"
            )
        return model_of_run(run, llm, device)
    if not config.is_file():
        raise ValueError(
            f"RUN must be a run of {LLAVA_STAGE1} or {LLAVA_STAGE2}, a checkpoint of it, or a LLaVA of transformers, "
            f"got {where}, which {'has no config.json' if where.is_dir() else 'is no folder'}"
        )
    if llm is not None or weights != "auto":
        name, value = ("llm", llm) if llm is not None else ("weights", weights)
        raise ValueError(f"--{name} has no effect on a folder of transformers, got {value}")
    return model_of_folder(where, template, device)
