"""Models that say something of pictures: captions by BLEU and CIDEr, answers by VQA's accuracy."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from mmcore import checkpoint
from mmcore.data import EvalSet, PairData, Question, QuestionSet
from mmcore.data.text.prompts import Task, prompt_texts
from mmcore.metrics.captions import bleu, cider
from mmcore.metrics.vqa import vqa_accuracy
from mmcore.report.sheets import plot_captions
from mmcore.tasks.subject import Options as OtherData
from mmcore.tasks.subject import Subject

BATCH_SIZE = 64
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
class SpeakingOptions:
    """A model that is asked: what it says, what stands before that, and how it chooses it, for a reader."""

    answerer: Answerer
    prompt: str | None
    decode: str

    @classmethod
    def of(cls, subject: Subject, kind: Task, options: Options | None) -> "SpeakingOptions":
        """As options say, or by default.

        Raises:
            ValueError: a model that does nothing of this kind.
        """
        prompts: Mapping[Task, str | None] = subject.recipe.prompts
        if kind not in prompts:
            what = "answers questions" if kind == "vqa" else "describes pictures"
            name = subject.run.recipe if subject.run else type(subject.recipe).__name__
            raise ValueError(f"RUN must be of a model that {what}, got one of {name}")
        decoding = Decoding() if options is None else options.decoding
        says = subject.recipe.speaks(subject.assets, subject.model, subject.device, decoding)
        own = None if options is None else options.prompt
        return cls(says, prompts[kind] if own is None else own, decoding.decode)


@dataclass(frozen=True)
class Captioned:
    """Held-out pictures with what a model says of them.

    Args:
        index: positions in the held-out set.
        texts: the captions.
        scores: "BLEU-4" in [0, 1], "CIDEr" in [0, 10].
    """

    index: list[int]
    texts: list[str]
    scores: dict[str, float]


@torch.no_grad()
def caption(answerer: Answerer, val: EvalSet, *, prompt: str | None, most: int | None = None) -> Captioned:
    """Captions of the held-out pictures, the first `most` of them, against people's.

    Raises:
        ValueError: no pictures, or too many of them broken.
    """
    index, texts = [], []
    for images, i in _first(val.raw_batches(BATCH_SIZE), most):
        texts += answerer(images, prompt_texts("caption", prompt, [""] * len(images)))
        index += i
    people = [val.captions[i] for i in index]
    return Captioned(index, texts, {"BLEU-4": bleu(texts, people)["BLEU-4"], "CIDEr": cider(texts, people)})


@dataclass(frozen=True)
class Answered:
    """Held-out questions with a model's answers.

    Args:
        questions: those of readable pictures, in order.
        texts: the answers.
        accuracy: VQA's, in [0, 1].
        by_type: VQA's, by the type of the answer where the data says it.
    """

    questions: list[Question]
    texts: list[str]
    accuracy: float
    by_type: dict[str, float]


@torch.no_grad()
def answer(answerer: Answerer, val: QuestionSet, *, prompt: str | None, most: int | None = None) -> Answered:
    """Answers to the held-out questions, the first `most` of them, against people's.

    Raises:
        ValueError: no questions, or too many broken pictures.
    """
    questions: list[Question] = []
    texts: list[str] = []
    for images, asked in _first(val.raw_batches(BATCH_SIZE), most):
        texts += answerer(images, prompt_texts("vqa", prompt, [q.text for q in asked]))
        questions += asked
    types = [q.answer_type or "" for q in questions]
    found = vqa_accuracy(texts, [q.answers for q in questions], types=types if all(types) else None)
    return Answered(questions, texts, found.overall, found.by_type)


def majority_accuracy(train: QuestionSet, val: Sequence[Question]) -> float:
    """VQA's accuracy of the answer that is most frequent in training, given to every question."""
    most = Counter(a for q in train.questions for a in q.answers if a.strip()).most_common(1)[0][0]
    return vqa_accuracy([most] * len(val), [q.answers for q in val]).overall


def _first(batches: Iterable[Any], most: int | None) -> Iterable[Any]:
    """Whole batches, as many as make up `most`."""
    return islice(batches, None if most is None else -(-most // BATCH_SIZE))


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
