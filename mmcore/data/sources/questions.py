"""Questions about images: pairs of a question and an answer to train on, and questions in order to evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from mmcore.data.sources.base import Measured, PairSource
from mmcore.data.transforms.images import Preprocess

NO_IMAGE = Image.new("RGB", (32, 32), (127, 127, 127))
"""This very image stands for that of a question without one; a model that takes texts alone is given none."""
NUM_ANNOTATORS = 10
"""Answers to a question in VQAv2; a derived question has as many equal ones, so that VQA's accuracy is 0 or 1."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the answers that people gave to it.

    Args:
        question_id: as the source gives it.
        text: the question.
        answers: one from each annotator, repeats included, which is what VQA's accuracy counts.
        question_type: its first words, by which VQA's accuracy is broken down, or None.
        answer_type: what accuracies are told apart by, such as 'yes/no', 'number' and 'other', or a subject; or None.
        choices: what the answer is one of, in the order of the letters A, B and so on; none = it is free.
        groups: further kinds that it belongs to, whose accuracy is told.
        has_image: whether it is about one.
    """

    question_id: int | str
    text: str
    answers: tuple[str, ...]
    question_type: str | None = None
    answer_type: str | None = None
    choices: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    has_image: bool = True


@dataclass(repr=False)
class QuestionSet(Measured, PairSource):
    """Questions with an image each; the caption is an answer.

    Args:
        name: the source, for prints; says so where the questions are derived.
        source: image i is what question i asks about.
        questions: the questions.
        derived: made by templates from captions or classes, not asked by people.
        max_broken: share of broken images above which `raw_batches` raises.
    """

    name: str
    source: PairSource
    questions: list[Question]
    derived: bool
    max_broken: float = 0.0
    broken: dict[str, int] = field(default_factory=dict)
    """Broken images met in the latest pass, by reason."""

    @property
    def what(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"the images of {self.name}"

    def __len__(self) -> int:
        return len(self.questions)

    def sample_id(self, i: int) -> str:
        """Name of the image and the question's own."""
        return f"{self.source.sample_id(i)}, question {self.questions[i].question_id}"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return self.source.raw_image(i, least) if self.questions[i].has_image else NO_IMAGE

    def image_id(self, i: int) -> int:
        return self.source.image_id(i)

    def question(self, i: int) -> str:
        return self.questions[i].text

    def answers(self, i: int) -> tuple[str, ...]:
        return self.questions[i].answers

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """An answer to question `i`, as likely as the share of the annotators who gave it."""
        answers = [a for a in self.questions[i].answers if a.strip()]
        return answers[int(rng.integers(len(answers)))]

    def all_captions(self, i: int) -> list[str]:
        """The distinct answers to question `i`."""
        return list(dict.fromkeys(a for a in self.questions[i].answers if a.strip()))

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        if self.questions[i].has_image:
            return self.source.augment(i, preprocess, rng)
        return super().augment(i, preprocess, rng)

    def batches(self, batch_size: int, preprocess: Preprocess) -> Iterator[tuple[Tensor, list[Question]]]:
        """As `raw_batches`, the images uint8 [B, 3, S, S]."""
        for images, questions in self.raw_batches(batch_size):
            yield preprocess(images), questions

    def raw_batches(self, batch_size: int) -> Iterator[tuple[list[Image.Image], list[Question]]]:
        """All questions in order with their images, RGB, less those about broken images; ValueError for too many."""
        for images, indices in self._good_images(batch_size):
            yield images, [self.questions[i] for i in indices]
