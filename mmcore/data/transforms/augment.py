"""What supervised training does to an image besides a crop: RandAugment, and erasing a rectangle."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from mmcore.ops import require

MAX_MAGNITUDE = 10
_GREY = (124, 116, 104)  # ImageNet's mean, which fills what a shift or a turn leaves empty
_TRIES = 10


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Callable[[Image.Image, float], Image.Image]:
    def change(image: Image.Image, by: float) -> Image.Image:
        options: Any = {"resample": Image.Resampling.BICUBIC, "fillcolor": _GREY}
        return image.transform(image.size, Image.Transform.AFFINE, matrix(by, image), **options)

    return change


def _turned(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=_GREY)


def _added(image: Image.Image, by: float) -> Image.Image:
    """What is darker than the middle is lightened."""
    return image.point([min(255, x + int(by)) if x < 128 else x for x in range(256)] * 3)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, by: kind(image).enhance(1 + by)


# what is done by a number, the number at magnitude 10, and whether its sign is drawn
_CHANGES: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, bool]] = {
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), 0, False),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0, False),
    "invert": (lambda image, _: ImageOps.invert(image), 0, False),
    "rotate": (_turned, 30, True),
    "posterize": (lambda image, by: ImageOps.posterize(image, 4 - int(by)) if by < 4 else image, 4, False),
    "solarize": (lambda image, by: ImageOps.solarize(image, 256 - min(256, int(by))), 256, False),
    "solarize_add": (_added, 110, False),
    "color": (_enhanced(ImageEnhance.Color), 0.9, True),
    "contrast": (_enhanced(ImageEnhance.Contrast), 0.9, True),
    "brightness": (_enhanced(ImageEnhance.Brightness), 0.9, True),
    "sharpness": (_enhanced(ImageEnhance.Sharpness), 0.9, True),
    "shear_x": (_affine(lambda by, _: (1, by, 0, 0, 1, 0)), 0.3, True),
    "shear_y": (_affine(lambda by, _: (1, 0, 0, by, 1, 0)), 0.3, True),
    "translate_x": (_affine(lambda by, image: (1, 0, by * image.width, 0, 1, 0)), 0.45, True),
    "translate_y": (_affine(lambda by, image: (1, 0, 0, 0, 1, by * image.height)), 0.45, True),
}


def changed(image: Image.Image, name: str, magnitude: float, *, sign: int = 1) -> Image.Image:
    """One of RandAugment's changes, by its name, of an RGB image; `magnitude` from 0 to 10."""
    change, most, _ = _CHANGES[name]
    return change(image, sign * most * magnitude / MAX_MAGNITUDE)


def rand_augment(
    image: Image.Image, magnitude: float, rng: np.random.Generator, *, num: int = 2, spread: float = 0.5
) -> Image.Image:
    """RandAugment (arXiv:1909.13719) as DeiT trains with it: `num` changes, each with probability 1/2 and of a
    magnitude of mean `magnitude` and deviation `spread`, which grow stronger with it.

    Raises:
        ValueError: a magnitude that is not from 0 to 10.
    """
    fits = 0 <= magnitude <= MAX_MAGNITUDE
    require("rand_augment", fits, "magnitude must be from 0 to {}, got {}", MAX_MAGNITUDE, magnitude)
    names = list(_CHANGES)
    for i in rng.integers(len(names), size=num):
        if rng.random() < 0.5:
            continue
        drawn = min(max(rng.normal(magnitude, spread), 0.0), MAX_MAGNITUDE)
        sign = -1 if _CHANGES[names[i]][2] and rng.random() < 0.5 else 1
        image = changed(image, names[i], drawn, sign=sign)
    return image


def erased(
    pixels: Tensor,
    rng: np.random.Generator,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    scale: tuple[float, float] = (0.02, 1 / 3),
) -> Tensor:
    """Noise of the data's `mean` and `std` in a rectangle of uint8 [3, H, W] of a share of its area drawn from `scale`,
    aspect 0.3 to 1 / 0.3 (random erasing, arXiv:1708.04896); as it is where ten draws do not fit into the image."""
    height, width = pixels.shape[1:]
    for _ in range(_TRIES):
        area, aspect = height * width * rng.uniform(*scale), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < tall < height and 0 < wide < width:
            top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            noise = rng.normal(size=(3, tall, wide)) * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))
            out = pixels.clone()
            filled = (255 * noise).round().clip(0, 255).astype(np.uint8)
            out[:, top : top + tall, left : left + wide] = torch.from_numpy(filled)
            return out
    return pixels
