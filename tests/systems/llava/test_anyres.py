"""Views and tiles of images of any resolution, to the pixel and the feature those of transformers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextModel
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmcore.systems.llava.anyres import (
    best_resolution,
    grid_shape,
    num_packed,
    num_views,
    pack_features,
    split_image,
)

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))
SIDES = st.one_of(st.integers(1, 64), st.integers(1, 20_000))
THIN = [(1, 20_000), (20_000, 1)]


def listed(pinpoints: Any) -> list[list[int]]:
    return [list(p) for p in pinpoints]


@given(SIDES, SIDES)
@example(1, 1)
@example(1, 20_000)
@example(20_000, 1)
@settings(max_examples=300, deadline=None)
def test_the_best_resolution_is_that_of_transformers(height: int, width: int) -> None:
    size = (height, width)
    assert best_resolution(size, PINPOINTS) == tuple(select_best_resolution(size, listed(PINPOINTS)))
    assert num_views(size, PINPOINTS, 336) == image_size_to_num_patches(size, listed(PINPOINTS), 336)


def test_an_image_or_a_grid_of_nothing_is_refused() -> None:
    for size in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="best_resolution: size must be 1 pixel or more each way, got"):
            best_resolution(size, PINPOINTS)
    with pytest.raises(ValueError, match="best_resolution: pinpoints must be one or more, got none"):
        best_resolution((5, 5), ())


@pytest.mark.parametrize(
    "size", [(40, 20), (10, 30), (17, 17), (1, 1), (3, 100), (100, 3), (200, 199), (64, 64)]
)
def test_views_are_those_of_transformers_to_the_pixel(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=listed(SMALL),
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(images=image, return_tensors="pt")
    views = split_image(image, SMALL, 16)
    found = torch.stack([torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views])
    assert len(views) == num_views(size, SMALL, 16)
    assert expected["image_sizes"].tolist() == [list(size)]
    assert torch.equal(found, expected["pixel_values"][0].to(torch.uint8))


@pytest.mark.parametrize("size", THIN)
def test_a_line_of_20000_pixels_has_views(size: tuple[int, int]) -> None:
    views = split_image(Image.new("RGB", (size[1], size[0]), "white"), SMALL, 16)
    assert [view.size for view in views] == [(16, 16)] * 3
    # the line itself is a pixel thin, in the middle of black
    assert sum(int(np.array(view).any(-1).sum()) for view in views[1:]) == (32 if size[0] == 1 else 16)


def theirs_packed(features: torch.Tensor, size: tuple[int, int], newline: torch.Tensor) -> torch.Tensor:
    tower = SimpleNamespace(image_size=16, patch_size=4)
    model: Any = SimpleNamespace(
        config=SimpleNamespace(vision_config=tower, image_grid_pinpoints=listed(SMALL))
    )
    packed, _ = LlavaNextModel.pack_image_features(
        model, [features], torch.tensor([size]), "default", image_newline=newline
    )
    return packed[0]


@given(SIDES, SIDES)
@example(1, 1)
@example(1, 20_000)
@example(20_000, 1)
@settings(max_examples=200, deadline=None)
def test_features_are_packed_as_by_transformers_and_counted_before(height: int, width: int) -> None:
    size = (height, width)
    features = torch.arange(num_views(size, SMALL, 16) * 32.0).view(-1, 16, 2)
    newline = torch.tensor([-1.0, -2.0])
    found = pack_features(features, size, grid_shape(size, SMALL, 16), newline)
    assert len(found) == num_packed(size, SMALL, 16, 4)
    assert torch.equal(found, theirs_packed(features, size, newline))
