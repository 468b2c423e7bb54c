"""Images of any shape as patches, as SigLIP 2's NaFlex has them (arXiv 2502.14786): each keeps its aspect, and has at
most a number of patches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmcore.data.transforms.images import Interpolation, to_pixels
from mmcore.ops import require

Grid = tuple[int, int]
"""Rows and columns of patches."""
_SCALES, _CLOSE = (1e-6, 100.0), 1e-5


def patch_grid(height: int, width: int, patch_size: int, most: int) -> Grid:
    """The grid of an image that is scaled, its aspect kept, to the most patches that are at most `most`: both sides are
    then rounded up to whole patches. The scale is found by halving, as SigLIP 2's image processor does, up to 100."""
    low, high = _SCALES

    def of(scale: float) -> Grid:
        rows, columns = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows, columns

    while high - low >= _CLOSE:
        middle = (low + high) / 2
        rows, columns = of(middle)
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return of(low)


class Patches(NamedTuple):
    """Images cut into patches, one image after the other.

    Args:
        rows: uint8 [N, 3, P, P], or floating point where they are normalised already.
        grids: rows and columns of patches of each image, from the top left row by row.
    """

    rows: Tensor
    grids: list[Grid]

    @property
    def counts(self) -> list[int]:
        """Patches of each image."""
        return [rows * columns for rows, columns in self.grids]

    def to(self, device: torch.device | str) -> "Patches":
        return self._replace(rows=self.rows.to(device))

    @classmethod
    def joined(cls, parts: Sequence["Patches"]) -> "Patches":
        return cls(torch.cat([part.rows for part in parts]), [grid for part in parts for grid in part.grids])

    def take(self, images: Sequence[int]) -> "Patches":
        """Those of some images, in any order."""
        parts = self.rows.split(self.counts)
        rows = [parts[i] for i in images] or [self.rows[:0]]
        return Patches(torch.cat(rows), [self.grids[i] for i in images])

    def part(self, images: slice) -> "Patches":
        """Those of some images, which follow each other."""
        first = sum(self.counts[: images.start])
        return Patches(self.rows[first : first + sum(self.counts[images])], self.grids[images])


def cut(image: Image.Image, grid: Grid, patch_size: int, resample: Image.Resampling) -> Patches:
    """An RGB image, resized to a grid of patches."""
    rows, columns = grid
    pixels = to_pixels(image.resize((columns * patch_size, rows * patch_size), resample))
    cells = pixels.unflatten(2, (columns, patch_size)).unflatten(1, (rows, patch_size))  # [3, h, P, w, P]
    return Patches(cells.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous(), [grid])


@dataclass(frozen=True)
class NaflexPreprocess:
    """What a model wants of an image: patches, uint8, of an image of any shape; it normalises them itself.

    Args:
        patch_size: pixels a side of a patch.
        max_patches: of an image, at most.
        mean, std: per channel, of pixels in [0, 1], by which they are normalised.
        interpolation: of the resize, with antialiasing.
    """

    patch_size: int
    max_patches: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name in ("patch_size", "max_patches"):
            value = getattr(self, name)
            require("NaflexPreprocess", value >= 1, "{} must be at least 1, got {}", name, value)

    @property
    def resample(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def __call__(self, images: Sequence[Image.Image]) -> Patches:
        """RGB images as evaluation sees them."""
        return Patches.joined([self.of(image, self.max_patches) for image in images])

    def of(self, image: Image.Image, most: int) -> Patches:
        """One image as `most` patches at most."""
        grid = patch_grid(image.height, image.width, self.patch_size, most)
        return cut(image, grid, self.patch_size, self.resample)

    def least(self, most: int) -> int:
        """Pixels of the shorter side with which an image has to be decoded: twice what is asked for."""
        return 2 * self.patch_size * math.isqrt(most)

    @property
    def summary(self) -> str:
        """For the reader."""
        mean, std = (" ".join(f"{x:.4g}" for x in numbers) for numbers in (self.mean, self.std))
        patches = f"{self.max_patches} patches of {self.patch_size} pixels at most"
        return f"{patches} by {self.interpolation}, of any shape, aspect kept; mean {mean}, std {std}"
