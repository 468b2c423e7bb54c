"""Images from untrusted bytes to pixels, with Pillow alone; they travel as uint8, and models normalise them."""

import io
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmcore.data.broken import BrokenRecord
from mmcore.ops import require

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Per-channel mean of CLIP's training images (Radford et al., arXiv 2103.00020)."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel standard deviation of CLIP's training images."""
MAX_IMAGE_PIXELS = 64_000_000
"""Larger images are refused as decompression bombs, before a pixel is decoded."""

Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Fit = Literal["crop", "squash", "pad"]
# The other formats of Pillow are rarely met in training data, and some of them start external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MAX_RESIZED_PIXELS = 2**24
CROP_SCALE = (0.9, 1.0)
"""Share of the area of a training view."""
_CROP_RATIO = (3 / 4, 4 / 3)
# What Pillow's decoders raise on damaged input, beside OSError.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error),
)


def decode_rgb(data: bytes, least: int | None = None) -> Image.Image:
    """RGB image of an encoded one, upright by its EXIF orientation; transparent parts become white.

    `least` are the pixels that the shorter side has to keep: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size,
    which takes a fraction of the time. Raises BrokenRecord for what is empty, not an image, truncated, or above
    `MAX_IMAGE_PIXELS`.
    """
    BrokenRecord.unless(bool(data), "empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenRecord("decompression bomb") from None
    except UnidentifiedImageError:
        raise BrokenRecord("not an image") from None
    except _DECODER_ERRORS:
        raise BrokenRecord("damaged image") from None
    BrokenRecord.unless(image.width * image.height <= MAX_IMAGE_PIXELS, "decompression bomb")
    try:
        if least is not None:
            image.draft(None, (least, least))
        return _to_rgb(image)
    except _DECODER_ERRORS:
        raise BrokenRecord("damaged image") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(*_DECODER_ERRORS):  # of what says nothing of its pixels: it stays as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def pad_to_square(image: Image.Image, color: Any = "white") -> Image.Image:
    """The whole RGB image, centred on a square of its longer side, as LLaVA and transformers round its place."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@dataclass(frozen=True)
class Preprocess:
    """What a model wants of an image: square RGB pixels, uint8, which it normalises itself.

    Args:
        size: pixels a side.
        mean, std: per channel, of pixels in [0, 1], by which they are normalised.
        interpolation: of the resize, with antialiasing.
        fit: "crop", the shorter side to `size` and then the centre; "squash", both sides to `size`; "pad", first made
            square by the colour that becomes 0, as LLaVA 1.5 has it.
    """

    size: int
    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD
    interpolation: Interpolation = "bicubic"
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        require("Preprocess", self.size >= 1, "size must be at least 1 pixel, got {}", self.size)
        for name, kinds in (("interpolation", Interpolation), ("fit", Fit)):
            known, value = get_args(kinds), getattr(self, name)
            require("Preprocess", value in known, "{} must be one of {}, got {!r}", name, known, value)
        for name in ("mean", "std"):
            value = getattr(self, name)
            are_numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in value)
            fits = len(value) == 3 and are_numbers and (name == "mean" or min(value) > 0)
            require("Preprocess", fits, "{} must be 3 numbers, one a channel, got {}", name, value)

    @property
    def resample(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images as evaluation sees them: uint8 [B, 3, S, S]."""
        return torch.stack([to_pixels(self._fitted(image)) for image in images])

    def _fitted(self, image: Image.Image) -> Image.Image:
        if self.fit == "crop":
            return resize_center_crop(image, self.size, self.resample)
        if self.fit == "pad":
            image = pad_to_square(image, tuple(int(255 * x) for x in self.mean))  # as LLaVA and transformers round it
        return image.resize((self.size, self.size), self.resample)

    @property
    def summary(self) -> str:
        """For the reader."""
        mean, std = (" ".join(f"{x:.4g}" for x in numbers) for numbers in (self.mean, self.std))
        how = {"crop": "shorter side, then the centre", "squash": "both sides", "pad": "padded to a square first"}
        return f"{self.size} pixels by {self.interpolation}, {how[self.fit]}; mean {mean}, std {std}"


def resize_center_crop(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The shorter side to `size` pixels, then the centre square, whose place is rounded down, as transformers does
    (torchvision rounds to even)."""
    short = min(image.size)
    width, height = (max(size, size * side // short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= _MAX_RESIZED_PIXELS:
        return image.resize((width, height), resample).crop((left, top, left + size, top + size))
    # of a strip of 10 x 10,000 pixels only the square is computed; Pillow rounds the box, some pixels by one
    scale_x, scale_y = image.width / width, image.height / height
    box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    return image.resize((size, size), resample, box=box)


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    scale: tuple[float, float] = CROP_SCALE,
) -> Image.Image:
    """A crop of a share of the area drawn from `scale`, aspect 3/4 to 4/3, to `size` pixels."""
    return random_crop(image, rng, scale).resize((size, size), resample)


def random_crop(image: Image.Image, rng: np.random.Generator, scale: tuple[float, float]) -> Image.Image:
    """That crop as it is."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        crop_w, crop_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            left = int(rng.integers(0, width - crop_w + 1))
            top = int(rng.integers(0, height - crop_h + 1))
            break
    else:
        # An elongated image has no such crop; it gets the largest centred one.
        ratio = min(max(width / height, _CROP_RATIO[0]), _CROP_RATIO[1])
        crop_w = max(1, min(width, round(height * ratio)))
        crop_h = max(1, min(height, round(width / ratio)))
        left, top = (width - crop_w) // 2, (height - crop_h) // 2
    return image.crop((left, top, left + crop_w, top + crop_h))


def training_view(load: Callable[[int], Image.Image], preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
    """A random crop for a model, of an image of at least as many pixels as `load` is asked for."""
    # what is left of a crop is still twice what is asked for, so that the resize filters as it would all pixels
    image = load(math.ceil(2 * preprocess.size / CROP_SCALE[0] ** 0.5))
    return random_resized_crop(image, preprocess.size, rng, preprocess.resample)


def to_pixels(image: Image.Image) -> Tensor:
    """Pixels of an RGB image: uint8 [3, H, W]."""
    # band by band: a copy by torch would wake its threads for each image, which then spin
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std of uint8 [B, 3, H, W], per channel: float32, on the pixels' device."""
    x = pixels.to(torch.float32).div_(255)
    for channel in range(3):  # by numbers: a tensor of them would have to be sent to the device
        x[:, channel].sub_(mean[channel]).div_(std[channel])
    return x
