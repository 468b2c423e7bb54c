"""Which patch of a held-out image each word of its caption takes, where they meet by late interaction: a picture."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmcore.data import Preprocess
from mmcore.report.sheets import plot_alignments
from mmcore.tasks.subject import Subject, nothing

NUM_DRAWN = 6
MAX_WORDS = 9


@dataclass(frozen=True)
class Aligns:
    """Images and captions as unit vectors of their parts.

    Args:
        preprocess: what it wants of an image.
        num_whole: K, those of an image as a whole, such as the class token.
        image: uint8 [B, 3, S, S] to [B, K + P, E], of the P patches row by row last.
        words: a caption to the text of its tokens, without those that begin and end it, and to their vectors [W, E].
    """

    preprocess: Preprocess
    num_whole: int
    image: Callable[[Tensor], Tensor]
    words: Callable[[str], tuple[list[str], Tensor]]


class Alignment(NamedTuple):
    """An image as the model sees it, uint8 [S, S, 3], the words of its caption, the cosine of each with each patch,
    [W, side, side], and which words are nearer to the image as a whole than to any patch, [W]."""

    image: Tensor
    words: list[str]
    cosines: Tensor
    is_whole: Tensor


@torch.no_grad()
def alignments(subject: Subject) -> list[Alignment]:
    """Of some held-out pairs of distinct captions, evenly drawn."""
    able, held_out = subject.recipe.aligns(subject.assets, subject.model, subject.device), subject.held_out
    distinct = list(dict.fromkeys(held_out.captions))
    captions = distinct[:: max(1, len(distinct) // NUM_DRAWN)][:NUM_DRAWN]
    owners = [int(held_out.owner[held_out.captions.index(caption)]) for caption in captions]
    images = able.preprocess([subject.val.raw_image(int(held_out.index[i])) for i in owners])
    found = []
    for image, tokens, caption in zip(images, able.image(images.to(subject.device)), captions, strict=True):
        words, vectors = able.words(caption)
        cosines = (vectors.float() @ tokens.float().T).cpu()[:MAX_WORDS]
        patches, is_whole = cosines[:, able.num_whole :], cosines.argmax(1) < able.num_whole
        side = math.isqrt(patches.shape[1])
        found.append(Alignment(image.permute(1, 2, 0), words[:MAX_WORDS], patches.unflatten(1, (side, side)), is_whole))
    return found


def follow(subject: Subject) -> dict[str, float]:
    """Nothing: it is a picture."""
    return {}


def report(subject: Subject, options: Any) -> list[Path]:
    """Draws some held-out images, and over each the cosines of a word of its caption with the patches."""
    if subject.pairs.val is None:
        return nothing(options, f"{subject.pairs.name} has no held-out pairs: give --val-data or --val-fraction")
    path = subject.folder / "alignment.png"
    title = f"{subject.pairs.name}, held-out: the patch that each word takes; grey: it is nearest to the whole image"
    plot_alignments(*zip(*alignments(subject), strict=True), path=path, title=title)
    return [path]
