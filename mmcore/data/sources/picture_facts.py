"""What the pixels of a drawing on white tell without a model: its main colour, and whether it is wide or tall."""

from typing import Literal, get_args

import numpy as np
from PIL import Image

Colour = Literal["black", "grey", "brown", "red", "orange", "yellow", "green", "blue", "purple"]
Proportions = Literal["wide", "tall", "even"]

COLOURS: tuple[Colour, ...] = get_args(Colour)
# what pixels are looked at, of a side, and how few of them are no drawing
_SIDE, _LEAST = 96, 20
# brighter in all channels is the white that it stands on, of 255
_WHITE = 230
# hues in degrees from which a colour's name holds
_HUES: dict[int, Colour] = {0: "red", 15: "orange", 42: "yellow", 70: "green", 170: "blue", 260: "purple", 345: "red"}
# longer side by shorter one: up to the first about equal, from the second clearly not
_EVEN, _UNEVEN = 1.15, 1.3


def main_colour(image: Image.Image) -> Colour | None:
    """The colour of more than half of what is not white in an RGB image, or None where no colour has as much."""
    pixels = _pixels(image)
    drawn = pixels[_drawn(pixels)]  # [N, 3]
    if len(drawn) < _LEAST:
        return None
    counts = np.bincount(_colours(drawn), minlength=len(COLOURS))
    most = int(counts.argmax())
    return COLOURS[most] if 2 * counts[most] > len(drawn) else None


def proportions(image: Image.Image) -> Proportions | None:
    """Whether what is not white in an RGB image is wide, tall, or about as wide as tall; None where that is unclear."""
    drawn = _drawn(_pixels(image))
    if drawn.sum() < _LEAST:
        return None
    rows, columns = drawn.any(1).nonzero()[0], drawn.any(0).nonzero()[0]
    height = (rows[-1] - rows[0] + 1) * image.height
    width = (columns[-1] - columns[0] + 1) * image.width
    ratio = max(width, height) / min(width, height)
    if ratio <= _EVEN:
        return "even"
    if ratio < _UNEVEN:
        return None
    return "wide" if width > height else "tall"


def _pixels(image: Image.Image) -> np.ndarray:
    """Pixels picked, not averaged: an average with the white around is a colour that nothing has."""
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST))


def _drawn(pixels: np.ndarray) -> np.ndarray:
    return pixels.min(-1) < _WHITE


def _colours(pixels: np.ndarray) -> np.ndarray:
    """Numbers in `COLOURS` of uint8 [N, 3]: [N]."""
    hsv = np.asarray(Image.fromarray(pixels[None]).convert("HSV"))[0].astype(np.float64)
    hue, saturation, value = hsv[:, 0] * 360 / 255, hsv[:, 1] / 255, hsv[:, 2] / 255
    by_hue = np.array([COLOURS.index(name) for name in _HUES.values()])
    found = by_hue[np.searchsorted(list(_HUES), hue, side="right") - 1]
    is_brown = (hue >= 8) & (hue < 45) & ((value < 0.75) | (saturation < 0.55))
    found[is_brown] = COLOURS.index("brown")
    is_pale = saturation < 0.25
    found[is_pale] = COLOURS.index("grey")
    found[(value < 0.2) | (is_pale & (value < 0.3))] = COLOURS.index("black")
    return found
