"""scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels, with captions from templates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mmcore.data.sources import EvalSet
from mmcore.data.split import split_stratified

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
class Digits:
    """Scanned digits, as a PairSource.

    Args:
        pixels: uint8 [N, 8, 8], ink white on black.
        classes: the digit of each.
        numbers: position of each in scikit-learn's order.
    """

    pixels: np.ndarray
    classes: list[int]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.classes)

    def sample_id(self, i: int) -> str:
        """Name of scan `i`, by scikit-learn's order."""
        return f"digits:{self.numbers[i]}"

    def raw_image(self, i: int) -> Image.Image:
        """Scan `i`, RGB 8 x 8."""
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """Caption of scan `i` by a template drawn."""
        return DIGIT_TEMPLATES[int(rng.integers(len(DIGIT_TEMPLATES)))].format(DIGIT_NAMES[self.classes[i]])

    def all_captions(self, i: int) -> list[str]:
        """Caption of scan `i` by every template."""
        return [template.format(DIGIT_NAMES[self.classes[i]]) for template in DIGIT_TEMPLATES]

    def label(self, i: int, caption: str) -> int:
        """The digit: scans of the same digit are positives of each other."""
        return self.classes[i]

    def augment(self, image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        """Shift by up to 3/4 of a scan's pixel and scale by up to 12 %, in one bicubic step."""
        zoom = rng.uniform(*_SCALE)
        shift_x, shift_y = rng.uniform(-_MAX_SHIFT, _MAX_SHIFT, 2)
        step = _SIDE / (size * zoom)
        centre = _SIDE / 2
        left, top = (centre * (1 - 1 / zoom) - shift for shift in (shift_x, shift_y))
        matrix = (step, 0.0, float(left), 0.0, step, float(top))
        return image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)

    def take(self, indices: list[int]) -> Digits:
        """The scans at `indices`."""
        return Digits(
            self.pixels[indices], [self.classes[i] for i in indices], [self.numbers[i] for i in indices]
        )


def open_digits(val_fraction: float, seed: int) -> tuple[Digits, EvalSet | None]:
    """Training scans and held-out scans, split within each class.

    Args:
        val_fraction: share of each class to hold out; 0 holds out nothing.
        seed: seed of the split.
    """
    features, targets = load_digits(return_X_y=True)
    pixels = (np.asarray(features).reshape(-1, _SIDE, _SIDE) * (255 / 16)).round().astype(np.uint8)
    classes = [int(c) for c in targets]
    scans = Digits(pixels, classes, list(range(len(classes))))
    train, val = split_stratified(classes, val_fraction, seed)
    if not val:
        return scans, None
    held_out = scans.take(val)
    captions = [[DIGIT_TEMPLATES[0].format(DIGIT_NAMES[c])] for c in held_out.classes]
    return scans.take(train), EvalSet(held_out, range(len(val)), captions, labels=held_out.classes)
