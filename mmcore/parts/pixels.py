"""Pixels of patches as what a model of masked images predicts: targets, error, and a picture of what is predicted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcore.data import normalized
from mmcore.data.transforms.masks import hidden
from mmcore.parts.vit import VisionConfig

_EPS = 1e-6  # of the variance of a patch


def patchify(images: Tensor, size: int) -> Tensor:
    """[B, 3, S, S] to [B, P, 3 * size^2]: patches row by row, of each its rows, columns, colours."""
    x = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, S / size, S / size, size, size]
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    side = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(2, (size, size, 3)).unflatten(1, (side, side))  # [B, rows, columns, size, size, 3]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def masked_error(predicted: Tensor, target: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared errors of the patches, [B, P, C], that `kept` [B, K] does not name, summed: [], and how many."""
    error = (predicted - target).square().mean(2)  # [B, P]
    masked = hidden(kept, error.shape[1])
    return (error * masked).sum(), masked.sum()


@dataclass(frozen=True)
class PixelTargets:
    """Pixels of patches, normalised as `vision` has it."""

    vision: VisionConfig
    norm: bool  # a patch's mean is subtracted, and its (unbiased) deviation divided by (MAE's norm_pix_loss)

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, S, S], uint8 or normalised already, to [B, P, C] in float32 or the images' dtype."""
        if images.dtype == torch.uint8:
            images = normalized(images, self.vision.image_mean, self.vision.image_std)
        x = patchify(images, self.vision.patch_size)
        return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + _EPS).sqrt() if self.norm else x

    def draw(self, predicted: Tensor, images: Tensor, kept: Tensor) -> Tensor:
        """uint8 [B, 3, S, S]: of uint8 images the patches `kept` (see `hidden`), others as predicted, [B, P, C].

        Mean and variance that the target leaves out are those of the kept patches: a masked one's own would show what
        nothing predicted.
        """
        x, predicted = PixelTargets(self.vision, norm=False)(images), predicted.float()
        masked = hidden(kept, x.shape[1])
        if self.norm:
            seen = (~masked).float()
            seen = (seen / seen.sum(1, keepdim=True).clamp(min=1))[:, :, None]  # [B, P, 1], of sum 1
            mean = (x.mean(2, keepdim=True) * seen).sum(1, keepdim=True)
            spread = ((x.var(2, keepdim=True) * seen).sum(1, keepdim=True) + _EPS).sqrt()
            predicted = predicted * spread + mean
        x = unpatchify(torch.where(masked[:, :, None], predicted, x), self.vision.patch_size)
        numbers = (self.vision.image_mean, self.vision.image_std)
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in numbers)
        return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
