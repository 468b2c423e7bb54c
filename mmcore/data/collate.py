"""Image-caption pairs as samples and batches: what recipes on pairs share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmcore.data.transforms.images import Preprocess, to_pixels
from mmcore.ops import require


class PairSample(NamedTuple):
    """One pair; an image uint8 [3, S, S]."""

    image: Tensor
    caption: str
    label: int
    image_id: int
    question: str | None = None


@dataclass(frozen=True)
class Batch:
    """Pairs of one rank.

    Args:
        images: uint8 [B, 3, S, S], which the model normalises.
        tokens: int64 [B, T], what the tokenizer made of the captions; T = 0 without a tokenizer.
        labels: int64 [B]; equal labels (the same class, or the same caption) are positives of each other, on
            all ranks.
        image_ids: int64 [B]; equal for samples of the same image, on all ranks and in all epochs.
        captions: B captions as text; answers to `questions` where there are some.
        questions: B questions as text, or None where captions stand alone.
    """

    images: Tensor
    tokens: Tensor
    labels: Tensor
    image_ids: Tensor
    captions: list[str]
    questions: list[str] | None = None


def pair_sample(record: Any, rng: np.random.Generator, preprocess: Preprocess, *, augment: bool = True) -> PairSample:
    """A record's image, in the view that its source trains on or else that of evaluation, and one of its captions."""
    caption = record.caption(rng)
    pixels = to_pixels(record.augment(preprocess, rng)) if augment else preprocess([record.image])[0]
    return PairSample(pixels, caption, record.label(caption), record.image_id, record.question)


def collate_pairs(
    samples: Sequence[PairSample],
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    stack: Callable[[list[Any]], Any] = torch.stack,
) -> Batch:
    """Pairs, all with a question or none, as a batch; without a tokenizer the captions are left as text. `stack` makes
    those of a batch of what `samples` have as images."""
    captions = [sample.caption for sample in samples]
    tokens = torch.zeros(len(captions), 0, dtype=torch.int64)
    if tokenizer is not None:
        tokens = tokenizer(captions)
        fits = tokens.dtype == torch.int64 and tokens.dim() == 2 and len(tokens) == len(captions)
        got = f"{tokens.dtype} {list(tokens.shape)}"
        require("data", fits, "tokenizer must return int64 [{}, T], got {}", len(captions), got)
    return Batch(
        stack([sample.image for sample in samples]),
        tokens,
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([sample.image_id for sample in samples]),
        captions,
        [sample.question for sample in samples if sample.question is not None] or None,
    )
