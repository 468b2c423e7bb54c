"""How well masked patches of held-out images are reconstructed, by R^2."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import Preprocess
from mmcore.data.transforms.masks import hidden
from mmcore.figures import shown
from mmcore.report.sheets import plot_reconstructions
from mmcore.tasks.subject import Subject, nothing

T = TypeVar("T")
FIGURE = "R^2 of masked patches"
BATCH_SIZE = 64
NUM_DRAWN = 8
_GREY = 128


@dataclass(frozen=True)
class Reconstructs:
    """Images uint8 [B, 3, S, S] from some of their patches, int64 [B, K]."""

    preprocess: Preprocess
    mask: Callable[[np.random.Generator], Tensor]  # to the patches of one image that are visible, [K]
    target: Callable[[Tensor], Tensor]  # images to what is predicted of each patch, [B, P, C]
    predict: Callable[[Tensor, Tensor], Tensor]  # images and visible patches to predictions [B, P, C]
    draw: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Predictions, images and visible patches to images: those patches as they are, others as predicted, with nothing
    else of the images in them."""


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    value = math.nan if subject.pairs.held_out_images() is None else r_squared(subject)
    return {} if math.isnan(value) else {FIGURE: value}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints R^2 of the masked patches of held-out images; draws some, masked and reconstructed."""
    held_out = subject.pairs.held_out_images()
    if held_out is None:
        return nothing(options, f"{subject.pairs.name} has no held-out images: give --val-data or --val-fraction")
    value, path = shown(FIGURE, r_squared(subject)), subject.folder / "reconstructions.png"
    print(f"{FIGURE} (held-out), against the mean of each place, {len(held_out)} images: {value}")
    title = f"{subject.pairs.name}: held-out images, masked and reconstructed; {FIGURE} {value}"
    originals, masked, reconstructed = (list(x.permute(0, 2, 3, 1).numpy()) for x in drawn(subject))
    plot_reconstructions(originals, masked, reconstructed, path, title=title)
    return [path]


@torch.no_grad()
def r_squared(subject: Subject) -> float:
    """1 - (squared error) / (squared distance from the mean of each place), over the masked patches of all held-out
    images: 0 is the best that can be said without seeing an image. NaN where all images are alike."""
    able = _able(subject)

    def sums(batch: tuple[Tensor, Tensor, Tensor], num_images: int) -> list[Tensor]:
        own, seen, kept = batch
        target = able.target(own.to(subject.device)).double()  # [B, P, C]
        predicted = able.predict(seen.to(subject.device), kept.to(subject.device)).double()
        masked = hidden(kept, target.shape[1]).to(subject.device)[:, :, None]
        masked[num_images:] = False
        error = ((predicted - target).square() * masked).sum()
        of_places = masked.sum(0), (target * masked).sum(0), (target.square() * masked).sum(0)
        return [x.cpu() for x in (error, *of_places)]

    error, num, total, squares = (torch.stack(x).sum(0) for x in zip(*_over(subject, able, sums), strict=True))
    spread = (squares - total**2 / num.clamp(min=1)).sum().item()
    return 1 - error.item() / spread if spread > 0 else math.nan


@torch.no_grad()
def drawn(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Some held-out images, with their masked patches grey, and as they are reconstructed: uint8 [N, 3, S, S] each."""
    able = _able(subject)
    images, _, kept = _over(subject, able, lambda batch, _: batch, most=BATCH_SIZE)[0]
    chosen = torch.arange(len(images))[:: max(1, len(images) // NUM_DRAWN)][:NUM_DRAWN]
    images, kept = images[chosen].to(subject.device), kept[chosen].to(subject.device)
    predicted = able.predict(images, kept)
    side = round(predicted.shape[1] ** 0.5)
    masked = hidden(kept, side**2).view(-1, 1, side, side)
    for axis in (2, 3):
        masked = masked.repeat_interleave(images.shape[2] // side, axis)
    return images.cpu(), images.masked_fill(masked, _GREY).cpu(), able.draw(predicted, images, kept).cpu()


def _able(subject: Subject) -> Reconstructs:
    return subject.recipe.reconstructs(subject.assets, subject.model, subject.device)


def _over(
    subject: Subject, able: Reconstructs, work: Callable[[tuple[Tensor, Tensor, Tensor], int], T], **options: Any
) -> list[T]:
    """`Ranks.over` of the held-out images; a batch is the records' images, those that the model sees, both uint8
    [B, 3, S, S], and which patches of them; and how many of them count."""
    seen = subject.pairs.held_out_images()
    other = None if subject.own is None else subject.recipe.pictures(subject.own).held_out_images()
    assert seen is not None

    def of(pictures: list[Image.Image], positions: list[int]) -> T:
        images = able.preprocess(pictures)
        kept = torch.stack([able.mask(np.random.default_rng([0, i])) for i in positions or [0]])
        own = images if other is None else able.preprocess([other.raw_image(i) for i in positions or [0]])
        return work((own, images, kept), len(positions))

    return subject.ranks.over(seen, BATCH_SIZE, of, **options)
