"""Pictures as people have them: upright, whatever their EXIF orientation says."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

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
