"""Augmented views of an image for self-supervision, with Pillow alone: numbers in a dataclass, tuples of them a recipe.

The numbers are those of the published code of SimCLR (arXiv:2002.05709), MoCo (1911.05722, 2003.04297), BYOL
(2006.07733), DINO (2104.14294), iBOT (2111.07832), DINOv2 (2304.07193), MAE (2111.06377), SimMIM (2111.09886),
MaskFeat (2112.09133) and BEiT (2106.08254).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from mmcore.data.transforms.images import Interpolation, Preprocess, random_resized_crop, to_pixels
from mmcore.ops import require

Change = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class View:
    """A random crop, resized, then changed in colour; a probability of 0 leaves a change out.

    Args:
        size: pixels a side.
        scale: share of the image's area that the crop has, from and to, in (0, 1].
        interpolation: of the resize.
        flip: probability of mirroring left and right.
        jitter: strengths of brightness, contrast, saturation and hue: a factor drawn within 1 +- strength, and a shift
            within +- strength of the circle of hues; in an order drawn anew.
        jitter_p, grey_p, blur_p, solarize_p: probabilities.
        blur: standard deviation of the Gaussian, in pixels of the view, from and to.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0

    def __post_init__(self) -> None:
        require("View", self.size >= 1, "size must be at least 1 pixel, got {}", self.size)
        is_range = 0 < self.scale[0] <= self.scale[1] <= 1
        require("View", is_range, "scale must be from and to within (0, 1], got {}", self.scale)
        for name in ("flip", "jitter_p", "grey_p", "blur_p", "solarize_p"):
            value = getattr(self, name)
            require("View", 0 <= value <= 1, "{} must be a probability, got {}", name, value)
        fits = min(self.jitter) >= 0 and self.jitter[3] <= 0.5 and 0 <= self.blur[0] <= self.blur[1]
        what = "jitter must be from 0, of the hue to 0.5, and blur from and to, got {} and {}"
        require("View", fits, what, self.jitter, self.blur)

    @property
    def least(self) -> int:
        """Pixels of the shorter side with which an image has to be decoded: the smallest crop is still twice `size`."""
        return int(2 * self.size / self.scale[0] ** 0.5) + 1

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A view of an RGB image of any size: RGB, `size` x `size`."""
        resample = Image.Resampling[self.interpolation.upper()]
        image = random_resized_crop(image, self.size, rng, resample, self.scale)
        if rng.random() < self.flip:
            image = ImageOps.mirror(image)
        if rng.random() < self.jitter_p:
            changes = [*map(partial(_drawn, rng), _ENHANCED, self.jitter), self._hue(rng)]
            for i in rng.permutation(len(changes)):
                image = changes[i](image)
        if rng.random() < self.grey_p:
            image = image.convert("L").convert("RGB")
        if rng.random() < self.blur_p:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*self.blur)))
        if rng.random() < self.solarize_p:
            image = ImageOps.solarize(image, 128)
        return image

    def _hue(self, rng: np.random.Generator) -> Change:
        return partial(shifted_hue, shift=rng.uniform(-self.jitter[3], self.jitter[3]))


def seen(record: Any, preprocess: Preprocess, rng: np.random.Generator, view: View | None) -> Tensor:
    """uint8 [3, S, S] of a record as a model wants it: by a view of the model's size and interpolation; None = by the
    view that the record's source trains on."""
    if view is None:
        return to_pixels(record.augment(preprocess, rng))
    view = replace(view, size=preprocess.size, interpolation=preprocess.interpolation)
    return to_pixels(view(record.load(view.least), rng))


_ENHANCED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _drawn(rng: np.random.Generator, kind: Callable[..., ImageEnhance._Enhance], strength: float) -> Change:
    factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
    return lambda image: kind(image).enhance(factor)


def shifted_hue(image: Image.Image, *, shift: float) -> Image.Image:
    """An RGB image with its hues moved by a share of their circle, in 256 steps; what leaves it comes in again."""
    hue, saturation, value = image.convert("HSV").split()
    moved = (np.asarray(hue).astype(np.int16) + int(shift * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


_JITTERED = View(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2)
MOCO_V1 = (replace(_JITTERED, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0),) * 2
MOCO_V2 = (replace(_JITTERED, blur_p=0.5),) * 2
SIMCLR = (View(interpolation="bicubic", jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey_p=0.2, blur_p=0.5),) * 2
_BYOL = View(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=1.0)
BYOL = (_BYOL, replace(_BYOL, blur_p=0.1, solarize_p=0.2))


def multi_crop(large: tuple[float, float], small: tuple[float, float], number: int, size: int = 96) -> tuple[View, ...]:
    """DINO's two large views and its small ones, by the shares of the area that they show."""
    first, second = (replace(view, scale=large) for view in BYOL)
    return (first, second, *[replace(_BYOL, size=size, scale=small, blur_p=0.5)] * number)


DINO = multi_crop((0.4, 1.0), (0.05, 0.4), 8)
IBOT = multi_crop((0.32, 1.0), (0.05, 0.32), 10)
DINOV2 = multi_crop((0.32, 1.0), (0.05, 0.32), 8, size=98)
CLASSIFIED = (View(),)  # before RandAugment, which takes the place of jitter in DeiT (arXiv:2012.12877)
MAE = (View(scale=(0.2, 1.0)),)
SIMMIM = (View(size=192, scale=(0.67, 1.0), interpolation="bilinear"),)
MASKFEAT = (View(scale=(0.5, 1.0)),)
BEIT = (View(jitter=(0.4, 0.4, 0.4, 0.0), jitter_p=1.0),)
