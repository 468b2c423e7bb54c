"""Pictures as people have them: upright, whatever their EXIF orientation says."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from mmcore.data.transforms.images import decode_rgb

ORIENTATION = 0x0112


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_is_upright_by_every_orientation_of_exif(kind: str, orientation: int, mode: str) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 8))  # which corner is the first
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image.convert(mode).save(file, kind, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert("RGB")
    found = decode_rgb(file.getvalue())
    assert found.size == wanted.size == ((64, 32) if orientation < 5 else (32, 64))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).max() <= 1
    small = decode_rgb(file.getvalue(), least=16)
    assert (small.width > small.height) == (found.width > found.height)


def test_an_orientation_that_is_none_changes_nothing() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = 99
    Image.new("RGB", (6, 4), "red").save(file, "JPEG", exif=exif)
    assert decode_rgb(file.getvalue()).size == (6, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage garbage", b"Exif\0\0MM", b"Exif\0\0MM\0*\xff\xff\xff\x08"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_is_none_costs_no_picture(kind: str, exif: bytes) -> None:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, kind, exif=exif)
    assert decode_rgb(file.getvalue()).size == (6, 4)


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_in_xmp_or_a_raw_profile_counts_too(orientation: int) -> None:
    exif, image = Image.Exif(), Image.new("RGB", (64, 32))
    exif[ORIENTATION] = orientation
    raw = exif.tobytes().hex()
    profile, xmp = PngInfo(), PngInfo()
    profile.add_text("Raw profile type exif", f"\nexif\n{len(raw) // 2:8}\n{raw}\n", zip=True)
    xmp.add_itxt("XML:com.adobe.xmp", f'<rdf:Description tiff:Orientation="{orientation}"/>')
    for info in (profile, xmp):
        image.save(file := io.BytesIO(), "PNG", pnginfo=info)
        assert decode_rgb(file.getvalue()).size == ((64, 32) if orientation == 3 else (32, 64))
