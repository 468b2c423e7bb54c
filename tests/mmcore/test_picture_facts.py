"""Facts from pixels: the main colour and the proportions of what is drawn on white, where they are clear."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmcore.data.sources.picture_facts import COLOURS, Colour, main_colour, proportions

SHADES: dict[Colour, list[tuple[int, int, int]]] = {
    "black": [(0, 0, 0), (40, 40, 45), (45, 5, 5)],
    "grey": [(128, 128, 128), (90, 90, 100), (220, 225, 215)],
    "brown": [(110, 70, 30), (200, 165, 115)],
    "red": [(220, 20, 20), (250, 60, 90), (180, 0, 40)],
    "orange": [(255, 140, 0)],
    "yellow": [(240, 230, 30)],
    "green": [(30, 160, 40), (0, 100, 0)],
    "blue": [(20, 40, 200), (60, 220, 230)],
    "purple": [(140, 30, 190), (240, 60, 200)],
}


def drawn(*boxes: tuple[int, int, int, int, tuple[int, int, int]], size: int = 200) -> Image.Image:
    """Boxes of (left, top, right, bottom, colour) on white."""
    image = Image.new("RGB", (size, size), "white")
    for left, top, right, bottom, colour in boxes:
        image.paste(colour, (left, top, right, bottom))
    return image


def test_every_colour_has_shades_and_each_shade_its_name() -> None:
    assert set(SHADES) == set(COLOURS)
    for name, shades in SHADES.items():
        for shade in shades:
            assert main_colour(drawn((20, 20, 180, 180, shade))) == name, shade


@pytest.mark.parametrize(("width", "expected"), [(90, "red"), (70, None), (50, "blue")])
def test_a_colour_is_told_where_it_is_more_than_half_of_what_is_drawn(
    width: int, expected: str | None
) -> None:
    red, blue, green = (220, 20, 20), (20, 40, 200), (30, 160, 40)
    boxes = [(0, 0, width, 100, red), (width, 0, 140, 100, blue), (0, 150, 60, 180, green)]
    assert main_colour(drawn(*boxes)) == expected


def test_lines_keep_their_colour_where_an_average_would_be_grey() -> None:
    lines = [(x, 0, x + 2, 400, (0, 0, 0)) for x in range(0, 400, 10)]
    assert main_colour(drawn(*lines, size=400)) == "black"


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (100, 100, "even"),
        (100, 90, "even"),
        (100, 82, None),
        (82, 100, None),
        (140, 100, "wide"),
        (100, 140, "tall"),
        (180, 6, "wide"),
    ],
)
def test_proportions_are_those_of_what_is_drawn_where_they_are_clear(
    width: int, height: int, expected: str | None
) -> None:
    for left in (0, 13):
        assert proportions(drawn((left, 5, left + width, 5 + height, (30, 160, 40)))) == expected


def test_proportions_count_the_image_s_own() -> None:
    assert proportions(Image.new("RGB", (300, 100), "red")) == "wide"
    assert proportions(Image.new("RGB", (100, 300), "red")) == "tall"


def test_an_image_that_is_white_all_over_tells_nothing() -> None:
    noise = np.random.default_rng(0).integers(231, 256, (60, 50, 3), dtype=np.uint8)
    for image in (Image.new("RGB", (60, 50), "white"), Image.fromarray(noise)):
        assert main_colour(image) is None and proportions(image) is None
