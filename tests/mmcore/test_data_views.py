"""Views: every change against torchvision's, pure in the random numbers, of any image."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from PIL import Image, ImageStat

from mmcore.data.transforms import views
from mmcore.data.transforms.views import DINO, MOCO_V2, View, shifted_hue
from tests.torchvision_stub import torchvision_or_skip

PLAIN = View(size=32, scale=(1.0, 1.0), flip=0.0)


def picture(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.1, 0.37, 0.5])
def test_hue_is_torchvisions_to_the_bit(shift: float) -> None:
    torchvision_or_skip()
    adjust_hue = import_module("torchvision.transforms.functional").adjust_hue
    assert shifted_hue(picture(), shift=shift).tobytes() == adjust_hue(picture(), shift).tobytes()


def test_each_change_is_drawn_as_often_and_as_strongly_as_its_numbers_say() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    rng = np.random.default_rng(0)
    drawn = replace(PLAIN, size=8, jitter=(0.4, 0.0, 0.0, 0.0), jitter_p=0.8)
    means = np.array([ImageStat.Stat(drawn(grey, rng)).mean[0] for _ in range(2000)])
    changed = means[means != 100]
    # 0.8 of 2,000 within 5 standard deviations (18), brightness uniform in 60 to 140
    assert abs(len(changed) - 1600) < 110 and 59 <= changed.min() < 62 and 138 < changed.max() <= 140
    assert abs(changed.mean() - 100) < 3
    flips = [view.getpixel((0, 0)) != (0, 0, 0) for view in (_flipped(rng) for _ in range(1000))]
    assert abs(sum(flips) - 300) < 75
    inverted = replace(PLAIN, solarize_p=1.0)(Image.new("RGB", (4, 4), (127, 128, 255)), rng)
    assert inverted.getpixel((0, 0)) == (127, 127, 0)
    assert np.ptp(np.asarray(replace(PLAIN, grey_p=1.0)(picture(), rng))[3, 3]) == 0


def _flipped(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (2, 2))
    image.putpixel((1, 0), (255, 255, 255))
    return replace(PLAIN, size=2, flip=0.3)(image, rng)


def test_a_blur_has_the_standard_deviation_of_the_views_pixels() -> None:
    edge = Image.new("RGB", (65, 65))
    edge.paste("white", (32, 0, 65, 65))
    blurred = replace(PLAIN, size=65, blur_p=1.0, blur=(3.0, 3.0))(edge, np.random.default_rng(0))
    slope = np.diff(np.asarray(blurred)[32, :, 0].astype(float))
    # Pillow's Gaussian is three box filters: within a tenth
    assert 2.7 < np.sqrt((slope * (np.arange(64) - 31) ** 2).sum() / slope.sum()) < 3.3


def test_views_are_pure_in_their_random_numbers_and_differ_from_each_other() -> None:
    image = picture((64, 48))
    first, again = ([v(image, np.random.default_rng([7, i])).tobytes() for i, v in enumerate(MOCO_V2)] for _ in "ab")
    assert first == again and first[0] != first[1]
    assert [view.size for view in DINO] == [224] * 2 + [96] * 8


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_an_image_of_any_size_has_views(size: tuple[int, int]) -> None:
    for view in (*DINO, *views.SIMCLR, *views.MAE):
        assert view(picture(size), np.random.default_rng(0)).size == (view.size, view.size)


@pytest.mark.parametrize(("options", "match"), [
    ({"size": 0}, "size must be at least 1 pixel, got 0"),
    ({"scale": (0.0, 1.0)}, r"scale must be from and to within \(0, 1\], got \(0.0, 1.0\)"),
    ({"flip": 1.5}, "flip must be a probability, got 1.5"),
    ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "of the hue to 0.5"),
])  # fmt: skip
def test_impossible_numbers_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        View(**options)
