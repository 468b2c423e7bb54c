"""What a source of pairs in random access gives, and the held-out pairs on top of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.images import resize_center_crop, to_tensor

Tokenize = Callable[[list[str]], Tensor]
"""Captions to int64 [B, T] tokens."""


class ImageSource(Protocol):
    """Images in random access, undecoded until asked for."""

    def sample_id(self, i: int) -> str:
        """Name of sample `i`, for logs."""
        ...

    def raw_image(self, i: int) -> Image.Image:
        """RGB image of sample `i`; raises BrokenRecord."""
        ...


class PairSource(ImageSource, Protocol):
    """Training pairs in random access; picklable, and every method a pure function of its arguments."""

    def __len__(self) -> int: ...

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """Caption of sample `i`, drawn by `rng` where it has several."""
        ...

    def all_captions(self, i: int) -> list[str]:
        """Every caption that `caption` may draw for sample `i`."""
        ...

    def label(self, i: int, caption: str) -> int:
        """Label of the pair; equal labels are positives of each other."""
        ...

    def augment(self, image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        """Training view of `size` x `size` pixels, drawn by `rng`."""
        ...


def caption_label(caption: str) -> int:
    """Label of a caption, the same on every rank: 63 bits of its BLAKE2 hash."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1


def check_tokens(tokens: Tensor, num_captions: int) -> Tensor:
    """`tokens`, if it is int64 [B, T] for B captions; raises a ValueError otherwise."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != num_captions:
        raise ValueError(
            f"data: tokenizer must return int64 [{num_captions}, T], got {tokens.dtype} {list(tokens.shape)}"
        )
    return tokens


@dataclass
class EvalSet:
    """Held-out images with their captions.

    Args:
        source: gives the images by `indices`.
        indices: position in `source` of each held-out image.
        captions: the captions of each image, one or several.
        labels: class of each image as an index into the class names, or None where there are no classes.
        max_broken: share of broken images above which `batches` raises.
    """

    source: ImageSource
    indices: Sequence[int]
    captions: list[list[str]]
    labels: list[int] | None = None
    max_broken: float = 0.0
    broken: dict[str, int] = field(default_factory=dict)
    """Broken images met in the latest pass of `batches`, by reason."""

    def __len__(self) -> int:
        return len(self.indices)

    def raw_image(self, i: int) -> Image.Image:
        """Held-out image `i` as it is, RGB, for pictures; raises BrokenRecord."""
        return self.source.raw_image(self.indices[i])

    def image(self, i: int, image_size: int) -> Tensor:
        """Held-out image `i`, centre-cropped and normalised: float32 [3, S, S]; raises BrokenRecord."""
        return to_tensor(resize_center_crop(self.raw_image(i), image_size))

    def batches(self, batch_size: int, image_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All held-out images in order: float32 [B, 3, S, S], and the int64 [B] indices of the images.

        Broken images are left out, so the indices tell which rows of `captions` and `labels` belong to the
        images.

        Raises:
            ValueError: `batch_size` or `image_size` below 1; more than `max_broken` of the images are broken.
        """
        if batch_size < 1 or image_size < 1:
            raise ValueError(
                "EvalSet.batches: batch_size and image_size must be at least 1, "
                f"got {batch_size} and {image_size}"
            )
        tally = BrokenTally(self.max_broken, "the held-out images")
        images: list[Tensor] = []
        indices: list[int] = []
        for i in range(len(self)):
            try:
                images.append(self.image(i, image_size))
                indices.append(i)
                tally.add(1)
            except BrokenRecord as error:
                tally.add(1, [(self.source.sample_id(self.indices[i]), error.reason)])
            if len(images) == batch_size:
                yield torch.stack(images), torch.tensor(indices)
                images, indices = [], []
        self.broken = dict(tally.counts)
        tally.check(final=True)
        if images:
            yield torch.stack(images), torch.tensor(indices)
