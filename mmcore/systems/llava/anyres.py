"""Images of any resolution as a view of the whole and tiles of it (LLaVA-NeXT), in transformers' arithmetic.

Sizes are (height, width), in pixels, as transformers and the checkpoints' grid pinpoints have them.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from PIL import Image
from torch import Tensor

from mmcore.ops import require

Size = tuple[int, int]


def next_pinpoints(side: int) -> tuple[Size, ...]:
    """LLaVA-NeXT's resolutions for a tower of this image size."""
    return ((side, 2 * side), (2 * side, side), (2 * side, 2 * side), (3 * side, side), (side, 3 * side))


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of an image's pixels, of several the one with the fewest to spare, of equal ones the
    first; a ValueError for an image without pixels, or no pinpoints."""
    height, width = size
    require("best_resolution", height > 0 and width > 0, "size must be 1 pixel or more each way, got {}", size)
    require("best_resolution", len(pinpoints) > 0, "pinpoints must be one or more, got {}", "none")

    def kept(pinpoint: Size) -> int:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        return min(int(width * scale) * int(height * scale), width * height)

    # of a line too thin for any nothing is kept: it gets the smallest
    return max(pinpoints, key=lambda p: (kept(p), kept(p) - p[0] * p[1]))


def grid_shape(size: Size, pinpoints: Sequence[Size], tile_size: int) -> Size:
    """How many rows and columns of tiles, of `tile_size` pixels each way, an image becomes."""
    height, width = best_resolution(size, pinpoints)
    return height // tile_size, width // tile_size


def num_views(size: Size, pinpoints: Sequence[Size], tile_size: int) -> int:
    """How many images the tower sees: the tiles and the whole."""
    return 1 + math.prod(grid_shape(size, pinpoints, tile_size))


def split_image(
    image: Image.Image, pinpoints: Sequence[Size], tile_size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> list[Image.Image]:
    """What the tower sees of an RGB image: all of it, squeezed into a square, and then its tiles, row by row.

    The tiles are cut of the image as large as the best pinpoint holds it, in the middle of black, as the processors of
    transformers and of LLaVA make them. Pinpoints are multiples of `tile_size`, the views' pixels a side.
    """
    height, width = best_resolution((image.height, image.width), pinpoints)
    scale = min(width / image.width, height / image.height)
    inner = min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    corners = product(range(0, height, tile_size), range(0, width, tile_size))
    tiles = [canvas.crop((left, top, left + tile_size, top + tile_size)) for top, left in corners]
    return [image.resize((tile_size, tile_size), resample), *tiles]


def margins(size: Size, padded: Size) -> Size:
    """How much of a grid of `padded` rows and columns, an image of `size` in its middle, is padding: above as below and
    left as right."""
    height, width = size
    rows, columns = padded
    # transformers' rounding; what rounds to nothing keeps no row where their number is even
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def num_packed(size: Size, pinpoints: Sequence[Size], tile_size: int, patch_size: int) -> int:
    """How many features `pack_features` gives for an image of this size."""
    side = tile_size // patch_size
    rows, columns = (side * n for n in grid_shape(size, pinpoints, tile_size))
    above, left = margins(size, (rows, columns))
    return side**2 + (rows - 2 * above) * (columns - 2 * left + 1)


def pack_features(features: Tensor, size: Size, grid: Size, newline: Tensor) -> Tensor:
    """Features [1 + tiles, P, D] of an image in the order in which a language model reads them, [N, D], N of
    `num_packed`: the whole, then its `grid` of tiles, of `grid_shape`, row by row, each ended by `newline` [D]."""
    side = math.isqrt(features.shape[1])
    tiles = features[1:].unflatten(0, grid).unflatten(2, (side, side)).transpose(1, 2)
    tiles = tiles.flatten(2, 3).flatten(0, 1)  # [rows, columns, D]
    rows, columns = tiles.shape[:2]
    above, left = margins(size, (rows, columns))
    tiles = tiles[above : rows - above, left : columns - left]
    ends = newline.to(tiles.dtype).expand(len(tiles), 1, -1)
    return torch.cat([features[0], torch.cat([tiles, ends], 1).flatten(0, 1)])
