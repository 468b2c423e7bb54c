"""Images from untrusted bytes to normalised tensors, with Pillow alone."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmcore.data.broken import BrokenRecord

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Per-channel mean of CLIP's training images (Radford et al., arXiv 2103.00020)."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel standard deviation of CLIP's training images."""
MAX_IMAGE_PIXELS = 64_000_000
"""Larger images are refused as decompression bombs, before a pixel is decoded."""

# The other formats of Pillow are rarely met in training data, and some of them start external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_CROP_SCALE = (0.9, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
# What Pillow's decoders raise on damaged input, beside OSError.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error),
)


def decode_rgb(data: bytes) -> Image.Image:
    """RGB image of an encoded one; transparent parts become white.

    Args:
        data: the bytes of a JPEG, PNG, WebP, GIF or BMP file.

    Returns:
        Image in mode RGB, its pixels loaded.

    Raises:
        BrokenRecord: empty, not an image, truncated, or above `MAX_IMAGE_PIXELS`.
    """
    if not data:
        raise BrokenRecord("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenRecord("decompression bomb") from None
    except UnidentifiedImageError:
        raise BrokenRecord("not an image") from None
    except _DECODER_ERRORS:
        raise BrokenRecord("damaged image") from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise BrokenRecord("decompression bomb")
    try:
        return _to_rgb(image)
    except _DECODER_ERRORS:
        raise BrokenRecord("damaged image") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def pad_to_square(image: Image.Image) -> Image.Image:
    """The whole RGB image, centred on a white square of its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def resize_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Evaluation transform: the shorter side to `size` pixels (bicubic), then the centre square."""
    short = min(image.size)
    width, height = (max(size, size * side // short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    scale_x, scale_y = image.width / width, image.height / height
    # Only the centre square is computed, so a strip of 10 x 10,000 pixels is never enlarged as a whole.
    box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def centred(images: Sequence[Image.Image], size: int) -> Tensor:
    """Images as evaluation sees them: float32 [B, 3, S, S]."""
    return torch.stack([to_tensor(resize_center_crop(image, size)) for image in images])


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Training transform: crop 90 to 100 % of the area, aspect 3/4 to 4/3, to `size` pixels (bicubic)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*_CROP_SCALE)
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
    crop = image.crop((left, top, left + crop_w, top + crop_h))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """Normalised tensor (x / 255 - IMAGE_MEAN) / IMAGE_STD of an RGB image: float32 [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD).view(3, 1, 1)
    return pixels.sub_(mean).div_(std).contiguous()


def image_processor_config(image_size: int) -> dict[str, Any]:
    """How evaluation prepares an image, as transformers' CLIPImageProcessor reads it (preprocessor_config.json)."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
