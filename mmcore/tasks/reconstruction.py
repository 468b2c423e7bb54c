"""How well masked patches of held-out images are predicted: their values, their tokens, or their features."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.data import Preprocess
from mmcore.data.transforms.masks import hidden
from mmcore.figures import shown
from mmcore.report.sheets import plot_reconstructions
from mmcore.tasks.subject import Subject, nothing

T = TypeVar("T")
FIGURE = "R^2 of masked patches"
ACCURACY, OVER_FREQUENT = "accuracy of masked tokens", "accuracy above each place's most frequent token"
COSINE, OVER_MEAN = "cosine of masked features", "cosine above each place's mean feature"
BATCH_SIZE = 64
NUM_DRAWN = 8
_GREY = 128


@dataclass(frozen=True)
class Reconstructs:
    """Masked patches of images uint8 [B, 3, S, S], which ones as of `hidden`: those that are visible, int64 [B, K], or
    those that are not, bool [B, P]."""

    preprocess: Preprocess
    mask: Callable[[np.random.Generator], Tensor]  # to the patches of one image, [K] or [P]
    target: Callable[[Tensor], Tensor]
    """Images to what is predicted of each patch: values or features [B, P, C], or tokens, int64 [B, P]."""
    predict: Callable[[Tensor, Tensor], Tensor]
    """Images and masks to predictions [B, P, C], of tokens the logits."""
    draw: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Predictions, images and masks to images: visible patches as they are, others as predicted, with nothing else of
    the images in them; None = there is no picture of what is predicted."""
    score: Literal["R^2", "accuracy", "cosine"] = "R^2"


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    found = {} if subject.pairs.held_out_images() is None else figures(subject)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints how well the masked patches of held-out images are predicted; draws some, masked and reconstructed."""
    held_out, able = subject.pairs.held_out_images(), _able(subject)
    if held_out is None:
        return nothing(options, f"{subject.pairs.name} has no held-out images: give --val-data or --val-fraction")
    found = figures(subject)
    for name, value in found.items():
        against = ", against the mean of each place" if name == FIGURE else ""
        print(f"{name} (held-out){against}, {len(held_out)} images: {shown(name, value)}")
    if able.draw is None:
        return []
    path, value = subject.folder / "reconstructions.png", shown(FIGURE, found[FIGURE])
    title = f"{subject.pairs.name}: held-out images, masked and reconstructed; {FIGURE} {value}"
    originals, masked, reconstructed = (list(x.permute(0, 2, 3, 1).numpy()) for x in drawn(subject))
    plot_reconstructions(originals, masked, reconstructed, path, title=title)
    return [path]


@torch.no_grad()
def figures(subject: Subject) -> dict[str, float]:
    """Over the masked patches of all held-out images:

    - of values, R^2: 1 - (squared error) / (squared distance from the mean of each place); 0 is the best that can be
      said without seeing an image, NaN where all images are alike;
    - of tokens, the share that is right, and by how much that is above the most frequent token of each place;
    - of features, the mean cosine, and by how much it is above that of the mean of each place's unit features.
    """
    able = _able(subject)
    sums = {"R^2": _squares, "accuracy": _right, "cosine": _cosines}[able.score]

    def of(batch: tuple[Tensor, Tensor, Tensor], num_images: int) -> list[Tensor]:
        own, seen, mask = batch
        target = able.target(own.to(subject.device))  # [B, P, C] or [B, P]
        predicted = able.predict(seen.to(subject.device), mask.to(subject.device)).double()
        masked = hidden(mask, target.shape[1]).to(subject.device)
        masked[num_images:] = False
        return [x.cpu() for x in sums(predicted, target, masked)]

    total = [torch.stack(x).sum(0) for x in zip(*_over(subject, able, of), strict=True)]
    if able.score == "R^2":
        error, num, values, squares = total
        spread = (squares - values**2 / num.clamp(min=1)).sum().item()
        return {FIGURE: 1 - error.item() / spread if spread > 0 else math.nan}
    good, num, of_places = total
    names = (ACCURACY, OVER_FREQUENT) if able.score == "accuracy" else (COSINE, OVER_MEAN)
    # what says most of a place without an image: of tokens the most frequent, of features the direction of their sum
    blind = of_places.amax(1).sum() if able.score == "accuracy" else of_places.norm(dim=1).sum()
    return dict(zip(names, [(good / num).item(), ((good - blind) / num).item()], strict=True))


def _squares(predicted: Tensor, target: Tensor, masked: Tensor) -> Sequence[Tensor]:
    """The squared error; of each place how many, their sum and that of their squares."""
    target, mask = target.double(), masked[:, :, None]
    error = ((predicted - target).square() * mask).sum()
    return error, mask.sum(0), (target * mask).sum(0), (target.square() * mask).sum(0)


def _right(predicted: Tensor, target: Tensor, masked: Tensor) -> Sequence[Tensor]:
    """How many are right, of how many; how often each place has each token, [P, V]."""
    right = (predicted.argmax(2) == target) & masked
    often = torch.zeros(predicted.shape[1:], dtype=torch.float64, device=target.device)
    often.scatter_add_(1, target.T, masked.T.double())
    return right.sum().double(), masked.sum(), often


def _cosines(predicted: Tensor, target: Tensor, masked: Tensor) -> Sequence[Tensor]:
    """The sum of cosines, of how many; of each place the sum of unit features, [P, C]."""
    predicted, target = (F.normalize(x.double(), dim=2) * masked[:, :, None] for x in (predicted, target))
    return (predicted * target).sum(), masked.sum(), target.sum(0)


@torch.no_grad()
def drawn(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Some held-out images, with their masked patches grey, and as they are reconstructed: uint8 [N, 3, S, S] each."""
    able = _able(subject)
    assert able.draw is not None
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
    [B, 3, S, S], and their masks; and how many of them count."""
    seen = subject.pairs.held_out_images()
    other = None if subject.own is None else subject.recipe.pictures(subject.own).held_out_images()
    assert seen is not None

    def of(pictures: list[Image.Image], positions: list[int]) -> T:
        images = able.preprocess(pictures)
        kept = torch.stack([able.mask(np.random.default_rng([0, i])) for i in positions or [0]])
        own = images if other is None else able.preprocess([other.raw_image(i) for i in positions or [0]])
        return work((own, images, kept), len(positions))

    return subject.ranks.over(seen, BATCH_SIZE, of, **options)
