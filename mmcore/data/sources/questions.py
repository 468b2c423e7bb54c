"""Questions about images: pairs of a question and an answer to train on, and questions in order to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from mmcore.data.sources.base import Measured, TrainImages, stable_hash
from mmcore.data.transforms.images import Preprocess

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
        answer_type: 'yes/no', 'number' or 'other', or None.
    """

    question_id: int | str
    text: str
    answers: tuple[str, ...]
    question_type: str | None = None
    answer_type: str | None = None


@dataclass(repr=False)
class QuestionSet(Measured):
    """Questions with an image each; as a PairSource, the caption is an answer.

    Args:
        name: the source, for prints; says so where the questions are derived.
        source: image i is what question i asks about.
        questions: the questions.
        derived: made by templates from captions or classes, not asked by people.
        max_broken: share of broken images above which `batches` raises.
    """

    name: str
    source: TrainImages
    questions: list[Question]
    derived: bool
    max_broken: float = 0.0
    broken: dict[str, int] = field(default_factory=dict)
    """Broken images met in the latest pass of `batches`, by reason."""

    def __len__(self) -> int:
        return len(self.questions)

    def sample_id(self, i: int) -> str:
        """Name of the image and the question's own."""
        return f"{self.source.sample_id(i)}, question {self.questions[i].question_id}"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        """RGB image of question `i`; raises BrokenRecord."""
        return self.source.raw_image(i, least)

    def image_id(self, i: int) -> int:
        """Which image question `i` asks about; equal for questions about the same one."""
        return self.source.image_id(i)

    def question(self, i: int) -> str:
        """Question `i` as text."""
        return self.questions[i].text

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """An answer to question `i`, as likely as the share of the annotators who gave it."""
        answers = [a for a in self.questions[i].answers if a.strip()]
        return answers[int(rng.integers(len(answers)))]

    def all_captions(self, i: int) -> list[str]:
        """The distinct answers to question `i`."""
        return list(dict.fromkeys(a for a in self.questions[i].answers if a.strip()))

    def label(self, i: int, caption: str) -> int:
        """Equal answers have equal labels."""
        return stable_hash(caption)

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        """Training view of the image, as its source draws it."""
        return self.source.augment(i, preprocess, rng)

    def batches(self, batch_size: int, preprocess: Preprocess) -> Iterator[tuple[Tensor, list[Question]]]:
        """All questions in order: uint8 [B, 3, S, S] images, and B questions.

        Questions about broken images are left out.

        Raises:
            ValueError: `batch_size` below 1; more than `max_broken` of the images are broken.
        """
        for images, questions in self.raw_batches(batch_size):
            yield preprocess(images), questions

    def raw_batches(self, batch_size: int) -> Iterator[tuple[list[Image.Image], list[Question]]]:
        """As `batches`, the images as they are.

        Raises:
            ValueError: more than `max_broken` of the images are broken.
        """
        for images, indices in self._good_images(self, range(len(self)), batch_size, f"the images of {self.name}"):
            yield images, [self.questions[i] for i in indices]
