"""Decoding of untrusted bytes, and the transforms."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcore.data import IMAGE_MEAN, IMAGE_STD, BrokenRecord, normalized
from mmcore.data.transforms.images import (
    MAX_IMAGE_PIXELS,
    decode_rgb,
    pad_to_square,
    random_resized_crop,
    resize_center_crop,
    to_pixels,
)
from tests.mmcore.data_fixtures import image_bytes


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that announces width x height pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "reason"), [
    (b"", "empty file"), (b"\x00" * 100, "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (image_bytes(1, (60, 60))[:-40], "damaged image"), (image_bytes(1, (60, 60), "JPEG")[:-200], "damaged image"),
    (image_bytes(1, (60, 60), "WEBP")[:-20], "damaged image"),
    (_bomb(MAX_IMAGE_PIXELS // 1_000 + 1, 1_000), "decompression bomb"),
    (_bomb(100_000, 1_000), "decompression bomb"), (_bomb(2**31 - 1, 2**31 - 1), "decompression bomb"),
])  # fmt: skip
def test_bad_bytes_are_a_broken_record_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenRecord) as caught:
        decode_rgb(data)
    assert caught.value.reason == reason
    with warnings.catch_warnings(), pytest.raises(BrokenRecord, match=reason):  # a bomb too
        warnings.simplefilter("error")
        decode_rgb(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), position=st.integers(0, 10_000),
    value=st.binary(min_size=1, max_size=12), cut=st.integers(0, 10_000),
)  # fmt: skip
def test_damaged_bytes_give_an_image_or_a_broken_record(kind: str, position: int, value: bytes, cut: int) -> None:
    data = image_bytes(5, (24, 24), kind)
    position %= len(data)
    data = (data[:position] + value + data[position + len(value) :])[: len(data) - cut % 50]
    try:
        assert decode_rgb(data).mode == "RGB"
    except BrokenRecord as error:
        assert error.reason in {"not an image", "damaged image", "decompression bomb"}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 255, 255))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([200, 0, 0, 0, 0, 255])
        image.putpixel((1, 1), 1)
        data = _encoded(image, transparency=0)
    else:
        data = _encoded(image.convert(mode))
    got = decode_rgb(data)
    assert got.getpixel((0, 0)) == (255, 255, 255) and got.getpixel((1, 1)) != (255, 255, 255)


def test_half_transparent_pixels_mix_with_white_and_sixteen_bit_grey_is_scaled_and_other_modes_become_rgb() -> None:
    half = decode_rgb(_encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51))))
    assert half.getpixel((0, 0)) == (204, 204, 204)
    grey = Image.fromarray(np.array([[0, 32_768, 65_535]], dtype=np.uint16))
    got = decode_rgb(_encoded(grey))
    assert [got.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    for mode in ("1", "L", "CMYK"):
        assert decode_rgb(_encoded(Image.new(mode, (3, 2)), "JPEG" if mode == "CMYK" else "PNG")).mode == "RGB"


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (64, 64), (33, 200), (7, 5), (16, 16)])
def test_resize_and_crop_equals_resizing_the_whole_image_first(size: tuple[int, int]) -> None:
    image = decode_rgb(image_bytes(4, size))
    short = min(size)
    width, height = (16 * side // short for side in size)
    left, top = (width - 16) // 2, (height - 16) // 2
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    want = np.asarray(whole.crop((left, top, left + 16, top + 16))).astype(int)
    assert np.array_equal(np.asarray(resize_center_crop(image, 16)).astype(int), want)
    assert resize_center_crop(Image.new("RGB", (1, 60_000)), 224).size == (224, 224)  # not enlarged before


def test_the_random_crop_has_the_announced_area_and_aspect_and_lies_in_the_image() -> None:
    # Each pixel's colour tells its place, so the crop's corners can be read back.
    side = 200
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    image = Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8))
    rng = np.random.default_rng(0)
    areas, corners = [], set()
    for _ in range(200):
        got = np.asarray(random_resized_crop(image, 400, rng)).astype(float)
        width, height = np.ptp(got[..., 0]) + 1, np.ptp(got[..., 1]) + 1
        areas.append(width * height / side**2)
        corners.add((got[..., 0].min(), got[..., 1].min()))
        assert 3 / 4 - 0.02 <= width / height <= 4 / 3 + 0.02
    # Sides are whole pixels of 200, so the area is known to 1 %.
    assert min(areas) >= 0.89 and max(areas) <= 1.0 and np.ptp(areas) > 0.07 and len(corners) > 50


def test_an_elongated_image_gets_the_centred_crop_of_the_nearest_aspect() -> None:
    image = Image.new("RGB", (400, 30), "red")
    image.paste("blue", (180, 0, 220, 30))
    got = random_resized_crop(image, 8, np.random.default_rng(0))
    assert got.getpixel((4, 4)) == (0, 0, 255) and got.size == (8, 8)


def test_padding_keeps_the_whole_image_in_the_middle_of_white() -> None:
    got = pad_to_square(Image.new("RGB", (10, 4), "black"))
    assert got.size == (10, 10)
    dark = np.asarray(got)[..., 0] == 0
    assert dark[3:7].all() and dark.sum() == 40


def test_tensors_are_normalised_with_the_statistics_of_clip() -> None:
    pixels = to_pixels(Image.new("RGB", (3, 2), (255, 0, 51)))
    tensor = normalized(pixels[None], IMAGE_MEAN, IMAGE_STD)[0]
    want = [(v - m) / s for v, m, s in zip((1.0, 0.0, 0.2), IMAGE_MEAN, IMAGE_STD, strict=True)]
    assert pixels.dtype == torch.uint8 and tensor.shape == (3, 2, 3) and tensor.is_contiguous()
    # Three float32 roundings of values below 4.
    assert torch.allclose(tensor[:, 0, 0], torch.tensor(want), rtol=0, atol=3 * 4 * 2**-24)
