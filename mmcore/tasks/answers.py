"""What a model says of held-out pictures: captions by BLEU and CIDEr, answers by VQA's accuracy."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mmcore.data import EvalSet
from mmcore.data.sources.questions import Question, QuestionSet
from mmcore.data.text.prompts import PromptTokens, prompt_texts
from mmcore.data.transforms.images import resize_center_crop, to_tensor
from mmcore.metrics.captions import bleu, cider
from mmcore.metrics.vqa import vqa_accuracy

BATCH_SIZE = 64

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


def centred(images: Sequence[Image.Image], size: int) -> Tensor:
    """Images as CLIP's and BLIP-2's evaluation sees them: float32 [B, 3, S, S]."""
    return torch.stack([to_tensor(resize_center_crop(image, size)) for image in images])


def language_answerer(
    forward: Callable[..., Any],
    tokens: PromptTokens,
    image_size: int,
    device: torch.device,
    decoding: Decoding,
) -> Answerer:
    """That of a `BLIP2LM`, bare or under an engine."""
    settings = {
        "max_new_tokens": tokens.max_answer,
        "eos_token_id": sorted(tokens.stops),
        "pad_token_id": tokens.tokenizer.pad_token_id,
        **decoding.generate_options(),
    }

    def answer(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        read = (centred(images, image_size), *tokens.prompts(prompts))
        return tokens.text(forward("generate", *(x.to(device) for x in read), **settings).cpu())

    return answer


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
