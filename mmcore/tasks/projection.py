"""Whether what a head makes of held-out images has collapsed: to one vector, or into few of its outputs."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.figures import DEVIATION as DEVIATION
from mmcore.figures import shown
from mmcore.tasks.subject import BATCH_SIZE, Subject, nothing

USED, UNUSED = "outputs used", "outputs unused"
ENTROPY, ENTROPY_OF_MEAN = "entropy of an output", "entropy of the mean output"


@torch.no_grad()
def figures(subject: Subject) -> dict[str, float]:
    """The standard deviation of unit-norm projections [N, D] times sqrt(D), the mean over D: 0 where all are one
    vector, 1 where they are spread evenly; the share of the D outputs that are the largest of some image, and that of
    the others. Where they are logits, whose temperature is a recipe's `shares_at`, the mean entropy of their softmaxes
    and that of the mean softmax, over log D: both 1 where all are uniform, both 0 where all are one."""
    images = subject.pairs.held_out_images()
    if images is None:
        return {}
    projects = subject.recipe.projects(subject.assets, subject.model, subject.device)

    def projected(good: list[Image.Image], positions: list[int]) -> Tensor:
        pixels = subject.assets.preprocess(good).to(subject.device)
        rows = projects(pixels).float().cpu()  # one an image, or as many of each
        return rows[: len(positions) * (len(rows) // len(pixels))]

    found = torch.cat(subject.ranks.over(images, BATCH_SIZE, projected))
    width = found.shape[1]
    deviation = F.normalize(found, dim=1).std(0, correction=0).mean().item() * width**0.5
    used = len(found.argmax(1).unique()) / width
    numbers = {DEVIATION: deviation, USED: used, UNUSED: 1 - used}
    if hasattr(subject.recipe, "shares_at"):
        shares = (found / subject.recipe.shares_at).softmax(1)
        entropies = torch.special.entr(shares).sum(1).mean(), torch.special.entr(shares.mean(0)).sum()
        each, of_mean = (x.item() / max(math.log(width), 1e-9) for x in entropies)
        numbers |= {ENTROPY: each, ENTROPY_OF_MEAN: of_mean}
    return numbers


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    return figures(subject)


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints them."""
    found = figures(subject)
    if not found:
        return nothing(options, f"{subject.pairs.name} has no held-out images: give --val-data or --val-fraction")
    for name in [name for name in found if name != UNUSED]:
        print(f"{name} (held-out): {shown(name, found[name])}")
    return []
