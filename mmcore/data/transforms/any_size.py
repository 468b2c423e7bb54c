"""Images of unequal sizes as ViLT has them (arXiv 2102.03334): the shorter side to a number of pixels, the longer at
most another, both whole patches."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mmcore.data.transforms.images import Interpolation
from mmcore.data.transforms.naflex import Grid, Patches, cut
from mmcore.ops import require

LONGEST = (1333, 800)
"""What the longer side may be of the shorter one: COCO's detectors' sizes."""


def shorter_side_grid(height: int, width: int, shorter: int, patch_size: int) -> Grid:
    """The grid of patches of an image whose shorter side becomes `shorter` pixels, or less where the longer one would
    be above 1333 / 800 of that; what fills no patch is squeezed in, never less than one patch is left."""
    longer = int(LONGEST[0] / LONGEST[1] * shorter)
    scale = shorter / min(height, width)
    sides = [float(shorter) if side == min(height, width) else scale * side for side in (height, width)]
    if max(sides) > longer:
        sides = [longer / max(sides) * side for side in sides]
    rows, columns = (max(1, int(side + 0.5) // patch_size) for side in sides)
    return rows, columns


@dataclass(frozen=True)
class AnySizePreprocess:
    """What a model wants of an image: patches, uint8, of an image whose sides are in proportion, to a patch; it
    normalises them itself.

    Args:
        shorter: pixels of the shorter side.
        patch_size: pixels a side of a patch.
        mean, std: per channel, of pixels in [0, 1], by which they are normalised.
        interpolation: of the resize, with antialiasing.
    """

    shorter: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        fits = 1 <= self.patch_size <= self.shorter
        what = "patch_size must be from 1 to the shorter side's {} pixels, got {}"
        require("AnySizePreprocess", fits, what, self.shorter, self.patch_size)

    @property
    def resample(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def __call__(self, images: Sequence[Image.Image]) -> Patches:
        """RGB images as evaluation sees them."""
        return Patches.joined([self.of(image) for image in images])

    def of(self, image: Image.Image) -> Patches:
        """One image."""
        grid = shorter_side_grid(image.height, image.width, self.shorter, self.patch_size)
        return cut(image, grid, self.patch_size, self.resample)

    @property
    def summary(self) -> str:
        """For the reader."""
        mean, std = (" ".join(f"{x:.4g}" for x in numbers) for numbers in (self.mean, self.std))
        sides = f"shorter side {self.shorter} pixels, longer at most {int(LONGEST[0] / LONGEST[1] * self.shorter)}"
        return f"{sides}, whole patches of {self.patch_size}, by {self.interpolation}; mean {mean}, std {std}"
