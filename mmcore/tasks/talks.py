"""Models to talk to, of a run or of a folder of transformers: the capability `converses`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmcore.data.text.templates import AUTO, TEMPLATES, ChatTokens
from mmcore.metrics.vqa import exact_match
from mmcore.runs import WeightsKey, find_run, is_run, read_run
from mmcore.systems import entries, recipe_entry
from mmcore.tasks.subject import default_device
from mmcore.weights.files import read_json

ASKED = [name for name, template in TEMPLATES.items() if not template.images_only]
"""Templates whose questions are read."""


class Reply(NamedTuple):
    """An answer of the model's beside that of conversation number `conversation` of a set, to a user's text without the
    image's mark."""

    conversation: int
    question: str
    said: str
    wanted: str

    @property
    def is_right(self) -> bool:
        """Equal in VQA's normal form."""
        return exact_match(self.said, self.wanted)


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen."""

    temperature: float = 0.0
    """0 = the likeliest token each time; above, tokens are drawn, the more freely the higher."""
    top_p: float = 1.0
    """Drawn from the likeliest tokens that make up this probability; with a temperature alone."""
    max_new_tokens: int = 512
    """Tokens of an answer, at most."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], got {self.top_p}")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"--top-p has no effect without a --temperature above 0, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")

    def options(self, tokens: ChatTokens) -> dict[str, Any]:
        """For `Llava.generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {
            "do_sample": self.temperature > 0,
            "num_beams": 1,
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": sorted(tokens.stops),
            "pad_token_id": tokens.pad_token_id,
            **(drawn if self.temperature > 0 else {}),
        }


def load_chat_model(
    where: Path,
    *,
    weights: WeightsKey = "auto",
    llm: Path | None = None,
    template: str | None = None,
    device: torch.device | None = None,
) -> Any:
    """A model that answers questions about images, as its system's `converses` gives it: of a run, a checkpoint of one,
    or a folder of transformers. A ValueError of anything else, and of a setting that the other kind has.

    Args:
        weights, llm: of a run, as of `read_run`.
        template: of a folder, how it was trained: v1, llama_3, chatml, auto; a run knows its own.
        device: None = the GPU where there is one.
    """
    device, config = device or default_device(), where / "config.json"
    if is_run(where) or (config.is_file() and "recipe" in read_json("RUN", config)):
        if template is not None:
            raise ValueError(f"--template has no effect on a run, which knows its own, got {template}")
        return _of_run(where, weights, llm, device)
    if not config.is_file():
        missing = "has no config.json" if where.is_dir() else "is no folder"
        wanted = "a run of a model that converses, a checkpoint of it, or a folder of transformers with one"
        raise ValueError(f"RUN must be {wanted}, got {where}, which {missing}")
    if llm is not None or weights != "auto":
        name, value = ("llm", llm) if llm is not None else ("weights", weights)
        raise ValueError(f"--{name} has no effect on a folder of transformers, got {value}")
    kind, known = str(read_json("RUN", config).get("model_type")), entries("CHATS")
    if kind not in known:
        raise ValueError(f"RUN must hold a model of one of {', '.join(known)}, got {kind!r} in {where}")
    return known[kind].load()(where, template, device)


def _of_run(where: Path, weights: WeightsKey, llm: Path | None, device: torch.device) -> Any:
    run = find_run(where, weights)
    trained = run.saved["settings"].get("template", AUTO)
    if trained not in (AUTO, *ASKED):
        which = f"which describes images alone (template {trained}): train llava-stage2 from it"
        raise ValueError(f"RUN must have learned to answer questions, got {where}, {which}")
    if not hasattr(recipe_entry(run.recipe).load(), "converses"):
        raise ValueError(f"RUN must be of a model that converses, got {where}, which is of {run.recipe}")
    found = read_run(where, weights, llm=llm)
    averaged = ", averaged" if run.key == "ema" else ""
    talks = found.recipe.converses(found.assets, found.model.to(device), device)  # pyright: ignore[reportAttributeAccessIssue]
    return replace(talks, origin=f"{run.folder} at step {run.step}{averaged}")
