"""Digits at random places of a canvas: what the pixels of an image have in common with its class is left to a model."""

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmcore.data.sources.digits import Digits, open_digits
from mmcore.data.transforms.images import Preprocess

_SIDE = 16
"""Pixels of an image as it is."""
_ZOOM = (0.6, 0.8)
"""Share of the canvas's side that a scan fills, from and to."""
_NOISE = 0.05
"""Standard deviation of the noise, of [0, 1]."""


@dataclass(frozen=True)
class Scattered(Digits):
    """Scanned digits, each at one place and of one size; a training view draws both anew, so that two of them show the
    same scan elsewhere.

    Args:
        inverted: the canvas is of a grey drawn from [0, 1], and the ink lighter or darker by at least half of the room
            that there is on the wider side.
    """

    inverted: bool = False

    def sample_id(self, i: int) -> str:
        return f"scattered:{self.numbers[i]}"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        """Scan `i`, RGB 16 x 16, always at the same place."""
        return self._placed(i, _SIDE, np.random.default_rng([zlib.crc32(b"scattered"), self.numbers[i]]))

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        return self._placed(i, preprocess.size, rng)

    def take(self, indices: list[int]) -> "Scattered":
        return Scattered(**vars(super().take(indices)), inverted=self.inverted)

    def _placed(self, i: int, size: int, rng: np.random.Generator) -> Image.Image:
        side = max(1, round(size * rng.uniform(*_ZOOM)))
        left, top = (int(rng.integers(size - side + 1)) for _ in range(2))
        scan = Image.fromarray(self.pixels[i]).resize((side, side), Image.Resampling.BILINEAR)
        ink = np.zeros((size, size))
        ink[top : top + side, left : left + side] = np.asarray(scan) / 255
        ground, contrast = 0.0, 1.0
        if self.inverted:
            ground = rng.uniform()
            room = max(ground, 1 - ground) * rng.uniform(0.5, 1)
            contrast = room if ground < 0.5 else -room
        canvas = ground + contrast * ink + rng.normal(0, _NOISE, ink.shape)
        return Image.fromarray((canvas * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def open_scattered(val_fraction: float, seed: int, *, inverted: bool) -> tuple[Scattered, Scattered | None]:
    """Training scans and held-out scans as of `open_digits`, scattered."""
    train, held_out = (side and Scattered(**vars(side), inverted=inverted) for side in open_digits(val_fraction, seed))
    assert train is not None
    return train, held_out  # pyright: ignore[reportReturnType]
