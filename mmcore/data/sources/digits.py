"""scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels, with captions from templates."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mmcore.data.sources.base import EvalSet, PairSource
from mmcore.data.sources.questions import NUM_ANNOTATORS, Question, QuestionSet
from mmcore.data.sources.split import split_stratified
from mmcore.data.transforms.images import Preprocess

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT_TEMPLATES = [
    "a scan of the digit {}",
    "a handwritten {}",
    "the number {} written by hand",
    "a small grey picture of the digit {}",
]
_SIDE = 8
_MAX_SHIFT = 0.75
_SCALE = (0.9, 1.12)


@dataclass(frozen=True)
class Digits(PairSource):
    """Scanned digits; scans of the same digit are positives of each other."""

    pixels: np.ndarray  # uint8 [N, 8, 8], ink white on black
    classes: list[int]  # the digit of each
    numbers: list[int]  # position of each in scikit-learn's order

    def __len__(self) -> int:
        return len(self.classes)

    def sample_id(self, i: int) -> str:
        return f"digits:{self.numbers[i]}"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        """Scan `i`, RGB 8 x 8."""
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def image_id(self, i: int) -> int:
        return self.numbers[i]

    def all_captions(self, i: int) -> list[str]:
        """Caption of scan `i` by every template."""
        return [template.format(DIGIT_NAMES[self.classes[i]]) for template in DIGIT_TEMPLATES]

    def label(self, i: int, caption: str) -> int:
        return self.classes[i]

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        """Shift by up to 3/4 of a scan's pixel and scale by up to 12 %, in one step."""
        size = preprocess.size
        zoom = rng.uniform(*_SCALE)
        shift_x, shift_y = rng.uniform(-_MAX_SHIFT, _MAX_SHIFT, 2)
        step = _SIDE / (size * zoom)
        left, top = (float(_SIDE / 2 * (1 - 1 / zoom) - shift) for shift in (shift_x, shift_y))
        matrix = (step, 0.0, left, 0.0, step, top)
        return self.raw_image(i).transform((size, size), Image.Transform.AFFINE, matrix, preprocess.resample)

    def take(self, indices: list[int]) -> "Digits":
        return Digits(self.pixels[indices], [self.classes[i] for i in indices], [self.numbers[i] for i in indices])


def open_digits(val_fraction: float, seed: int) -> tuple[Digits, Digits | None]:
    """Training scans and held-out scans, `val_fraction` of each class; 0 holds out nothing."""
    features, targets = load_digits(return_X_y=True)
    pixels = (np.asarray(features).reshape(-1, _SIDE, _SIDE) * (255 / 16)).round().astype(np.uint8)
    classes = [int(c) for c in targets]
    scans = Digits(pixels, classes, list(range(len(classes))))
    train, val = split_stratified(classes, val_fraction, seed)
    return (scans.take(train), scans.take(val)) if val else (scans, None)


def digit_captions(scans: Digits) -> EvalSet:
    """Held-out scans with the caption of the first template, and their classes."""
    captions = [[DIGIT_TEMPLATES[0].format(DIGIT_NAMES[c])] for c in scans.classes]
    return EvalSet(scans, range(len(scans)), captions, labels=scans.classes, labels_match=True)


def digit_questions(scans: Digits) -> QuestionSet:
    """Two questions about each scan, derived from its class: which digit it is, and whether that is even."""
    questions: list[Question] = []
    for digit, number in zip(scans.classes, scans.numbers, strict=True):
        for question, (answer, question_type, answer_type) in {
            "which digit is written here?": (DIGIT_NAMES[digit], "which digit", "number"),
            "is this digit even or odd?": (("even", "odd")[digit % 2], "is this", "other"),
        }.items():
            answers = (answer,) * NUM_ANNOTATORS
            question_id = f"{number}/{question_type}"
            questions.append(Question(question_id, question, answers, question_type, answer_type))
    twice = scans.take([i for i in range(len(scans)) for _ in range(2)])
    return QuestionSet("digits (derived questions)", twice, questions, derived=True)
