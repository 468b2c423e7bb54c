"""How often a masked patch of a held-out image is taken for what it is where it is seen, among learned prototypes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import Preprocess
from mmcore.figures import shown
from mmcore.tasks.subject import BATCH_SIZE, Subject, nothing

AGREEMENT = "agreement on masked patches"


@dataclass(frozen=True)
class Agrees:
    """Logits of patches over prototypes, with some of them masked or none."""

    preprocess: Preprocess
    mask: Callable[[np.random.Generator], Tensor]  # to the patches of one image that are masked, bool [P]
    logits: Callable[..., Tensor]  # uint8 [B, 3, S, S] and, of masked ones, bool [B, P], to [B, P, K]


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    value = math.nan if subject.pairs.held_out_images() is None else agreement(subject)
    return {} if math.isnan(value) else {AGREEMENT: value}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints it."""
    held_out = subject.pairs.held_out_images()
    if held_out is None:
        return nothing(options, f"{subject.pairs.name} has no held-out images: give --val-data or --val-fraction")
    what = "above the most frequent prototype"
    print(f"{AGREEMENT}, {what} (held-out), {len(held_out)} images: {shown(AGREEMENT, agreement(subject))}")
    return []


@torch.no_grad()
def agreement(subject: Subject) -> float:
    """(share of masked patches whose prototype is that of the same patch seen - m) / (1 - m), m the share of seen
    patches of the most frequent prototype: 0 is what can be had without an image, 1 all of them. NaN where all patches
    are of one. As in training, the prototype of a seen patch is the largest of its logits less their mean, here over
    all held-out images."""
    able: Agrees = subject.recipe.agrees(subject.assets, subject.model, subject.device)
    shown_images = subject.pairs.held_out_images()
    other = None if subject.own is None else subject.recipe.pictures(subject.own).held_out_images()
    assert shown_images is not None

    def sums(pictures: list[Image.Image], positions: list[int]) -> tuple[Tensor, int]:
        found = able.logits(able.preprocess(pictures).to(subject.device))[: len(positions)].flatten(0, 1)
        return found.sum(0, dtype=torch.float64).cpu(), len(found)

    totals, counts = zip(*subject.ranks.over(shown_images, BATCH_SIZE, sums), strict=True)
    centre = (torch.stack(totals).sum(0) / sum(counts)).float().to(subject.device)

    def of(pictures: list[Image.Image], positions: list[int]) -> tuple[Tensor, Tensor]:
        images = able.preprocess(pictures)
        masked = torch.stack([able.mask(np.random.default_rng([0, i])) for i in positions or [0]])
        own = images if other is None else able.preprocess([other.raw_image(i) for i in positions or [0]])
        told = able.logits(images.to(subject.device), masked.to(subject.device)).argmax(2).cpu()
        seen = (able.logits(own.to(subject.device)).float() - centre).argmax(2).cpu()
        masked[len(positions) :] = False
        return told[masked], seen[masked]

    told, seen = (torch.cat(x) for x in zip(*subject.ranks.over(shown_images, BATCH_SIZE, of), strict=True))
    most = seen.unique(return_counts=True)[1].max().item() / len(seen)
    same = (told == seen).double().mean().item()
    return math.nan if most == 1 else (same - most) / (1 - most)
