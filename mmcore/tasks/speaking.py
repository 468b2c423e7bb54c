"""Models that say something of pictures, captions or answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from mmcore import checkpoint
from mmcore.data import EvalSet, PairData, Question, QuestionSet
from mmcore.data.text.prompts import Task, prompt_texts
from mmcore.report.sheets import plot_captions
from mmcore.tasks.ranks import Ranks
from mmcore.tasks.subject import Options as OtherData
from mmcore.tasks.subject import Subject

BATCH_SIZE = 32
"""Of which an `Answerer` makes one call of the model."""
MAX_FOLLOWED = 256
"""Pictures or questions that a run is measured on while it trains."""
NUM_SHOWN = 24
"""Pictures of a sheet."""

Answerer = Callable[[Sequence[Image.Image], Sequence[str]], list[str]]
"""What a model says: B RGB images and B prompts to B texts."""


@dataclass(frozen=True)
class Decoding:
    """How text is chosen."""

    decode: Literal["greedy", "beam", "nucleus"] = "greedy"
    """greedy = the likeliest token each time; beam = the likeliest of --num-beams texts; nucleus = drawn from the
    likeliest tokens that make up --top-p."""
    num_beams: int = 5
    """Texts that a beam search follows, as published."""
    top_p: float = 0.9
    """Probability of the nucleus, as published."""

    def __post_init__(self) -> None:
        if self.num_beams < 2:
            raise ValueError(f"--num-beams must be at least 2, got {self.num_beams}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], got {self.top_p}")

    def options(self) -> dict[str, Any]:
        """For the `generate` of a Q-Former."""
        if self.decode == "beam":
            return {"num_beams": self.num_beams}
        return {"top_p": self.top_p} if self.decode == "nucleus" else {}

    def generate_options(self) -> dict[str, Any]:
        """For the `generate` of transformers."""
        sampling = {"do_sample": True, "top_k": 0} if self.decode == "nucleus" else {"do_sample": False}
        return sampling | self.options()


@dataclass(frozen=True)
class Options(OtherData):
    """Describe pictures, or answer questions about them."""

    annotations: str | None = None
    """VQAv2's file of the answers to the questions of --data."""
    prompt: str | None = None
    """Text before the caption, or the question's, with {} in its place; None = as it was trained, and of LLaVA that
    was trained on conversations, as published."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)
    llm: Path | None = None
    """Where the run's language model is now; None = where it was."""

    def held_out(self, **named: Any) -> PairData | None:
        """What is measured on in place of what the run held out."""
        return super().held_out(annotations=self.annotations, **named)


@dataclass(frozen=True)
class Speaker:
    """A model that is asked about pictures: what it says, what stands before that, and how it chooses it."""

    kind: Task
    answerer: Answerer
    prompt: str | None
    decode: str
    ranks: Ranks

    @classmethod
    def of(cls, subject: Subject, kind: Task, options: Options | None) -> "Speaker":
        """As options say, or by default; a ValueError of a model that does nothing of this kind."""
        prompts: Mapping[Task, str | None] = subject.recipe.prompts
        if kind not in prompts:
            what = "answers questions" if kind == "vqa" else "describes pictures"
            name = subject.run.recipe if subject.run else type(subject.recipe).__name__
            raise ValueError(f"RUN must be of a model that {what}, got one of {name}")
        options = options or Options()
        answerer = subject.recipe.speaks(subject.assets, subject.model, subject.device, options.decoding)
        prompt = prompts[kind] if options.prompt is None else options.prompt
        return cls(kind, answerer, prompt, options.decoding.decode, subject.ranks)

    @torch.no_grad()
    def about(self, val: EvalSet | QuestionSet, most: int | None = None) -> tuple[list[Any], list[str]]:
        """The positions or the questions of the held-out pictures, of the first `most`, and texts."""

        def said(images: list[Image.Image], positions: list[int]) -> tuple[list[Any], list[str]]:
            asked = [val.questions[i] for i in positions] if isinstance(val, QuestionSet) else positions
            questions = [x.text if isinstance(x, Question) else "" for x in asked] or [""]
            return asked, self.answerer(images, prompt_texts(self.kind, self.prompt, questions))[: len(asked)]

        found = self.ranks.over(val, BATCH_SIZE, said, most=most)
        return [x for asked, _ in found for x in asked], [text for _, texts in found for text in texts]


def spread(count: int) -> list[int]:
    """Pictures of a sheet: evenly spread over what there is."""
    return [i * count // NUM_SHOWN for i in range(NUM_SHOWN)] if count > NUM_SHOWN else list(range(count))


def written(
    file: Path,
    results: list[dict[str, Any]],
    images: list[Image.Image],
    texts: list[str],
    people: Sequence[Sequence[str]],
    **sheet: Any,
) -> list[Path]:
    """Results as JSON and a sheet of some as PNG, beside each other."""
    files = [file.with_suffix(f".{kind}") for kind in ("json", "png")]
    checkpoint.write_json(files[0], results)
    plot_captions(images, texts, people, files[1], **sheet)
    return files
