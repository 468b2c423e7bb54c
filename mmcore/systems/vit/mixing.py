"""Mixup and cutmix: images of a batch in pairs, each with a share of the loss of both classes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Mix(NamedTuple):
    """How a batch is mixed.

    Args:
        partner: [B], whose image each is mixed with.
        share: of the image itself, in [0, 1]; the partner has the rest.
        box: top, bottom, left and right of what is the partner's (cutmix, arXiv:1905.04899); None = the sum of both
            images (mixup, arXiv:1710.09412).
    """

    partner: np.ndarray
    share: float
    box: tuple[int, int, int, int] | None

    def partners(self, x: Tensor) -> Tensor:
        """Rows [B, ...] of the partners."""
        return x[torch.from_numpy(self.partner).to(x.device)]

    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S], mixed, and rounded to uint8."""
        other = self.partners(images)
        if self.box is None:
            return (images * self.share + other * (1 - self.share)).round().to(images.dtype)
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        return mixed


def draw(rng: np.random.Generator, num: int, size: int, mixup: float, cutmix: float) -> Mix | None:
    """A mix of `num` images of `size` pixels, its share drawn from Beta(a, a), a being `mixup` or `cutmix`; of two that
    are above 0 either, with even odds; None where none is."""
    if mixup == cutmix == 0:
        return None
    cuts = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cuts else mixup
    share, partner = float(rng.beta(alpha, alpha)), rng.permutation(num)
    if not cuts:
        return Mix(partner, share, None)
    side = int(size * (1 - share) ** 0.5)
    # a box that leaves the image is cut off, and the share is of what is left of it
    (top, bottom), (left, right) = (
        (max(0, middle - side // 2), min(size, middle + side // 2)) for middle in rng.integers(size, size=2).tolist()
    )
    area = (bottom - top) * (right - left)
    return Mix(partner, 1 - area / size**2, (top, bottom, left, right))
