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
from mmcore.data.transforms.images import resize_center_crop, to_tensor

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


class TrainImages(ImageSource, Protocol):
    """Images to train on; picklable, and every method a pure function of its arguments."""

    def image_id(self, i: int) -> int:
        """Which image sample `i` shows, in 63 bits: equal for all captions of one image, in every process."""
        ...

    def augment(self, image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        """Training view of `size` x `size` pixels, drawn by `rng`."""
        ...


class PairSource(TrainImages, Protocol):
    """Training pairs in random access."""

    def __len__(self) -> int: ...

    def question(self, i: int) -> str | None:
        """Question that the caption of sample `i` answers; None where captions stand alone."""
        ...

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """Caption of sample `i`, drawn by `rng` where it has several."""
        ...

    def all_captions(self, i: int) -> list[str]:
        """Every caption that `caption` may draw for sample `i`."""
        ...

    def label(self, i: int, caption: str) -> int:
        """Label of the pair; equal labels are positives of each other."""
        ...


def stable_hash(text: str) -> int:
    """63 bits of the BLAKE2 hash of a caption or an image's name, the same in every process."""
    # Names of files may hold lone surrogates, which stand for bytes that are not UTF-8.
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def parse_image_id(value: object) -> str | None:
    """An image_id as JSON gives it, text or a whole number, as text; None where it is absent.

    Raises:
        BrokenRecord: neither text nor a whole number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise BrokenRecord("image_id is neither text nor a whole number")
    return str(value)


def check_tokens(tokens: Tensor, num_captions: int) -> Tensor:
    """`tokens`, if it is int64 [B, T] for B captions; raises a ValueError otherwise."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != num_captions:
        raise ValueError(
            f"data: tokenizer must return int64 [{num_captions}, T], got {tokens.dtype} {list(tokens.shape)}"
        )
    return tokens


def image_batches(
    source: ImageSource, indices: Sequence[int], batch_size: int, image_size: int, tally: BrokenTally
) -> Iterator[tuple[Tensor, list[int]]]:
    """Images of `source` at `indices` in order, as evaluation sees them, without the broken ones.

    Returns:
        Iterator of float32 [B, 3, S, S], and the positions in `indices` of its B images.

    Raises:
        ValueError: `batch_size` or `image_size` below 1.
    """
    if batch_size < 1 or image_size < 1:
        raise ValueError(
            f"data: batch_size and image_size must be at least 1, got {batch_size} and {image_size}"
        )
    for images, positions in raw_image_batches(source, indices, batch_size, tally):
        yield torch.stack([to_tensor(resize_center_crop(x, image_size)) for x in images]), positions


def raw_image_batches(
    source: ImageSource, indices: Sequence[int], batch_size: int, tally: BrokenTally
) -> Iterator[tuple[list[Image.Image], list[int]]]:
    """RGB images of `source` at `indices` in order, as they are, without the broken ones; with the positions in
    `indices` of each batch's."""
    images: list[Image.Image] = []
    positions: list[int] = []
    for position, i in enumerate(indices):
        try:
            images.append(source.raw_image(i))
            positions.append(position)
            tally.add(1)
        except BrokenRecord as error:
            tally.add(1, [(source.sample_id(i), error.reason)])
        if len(images) == batch_size:
            yield images, positions
            images, positions = [], []
    if images:
        yield images, positions


@dataclass
class EvalSet:
    """Held-out images with their captions.

    Args:
        source: gives the images by `indices`.
        indices: position in `source` of each held-out image.
        captions: the captions of each image, one or several.
        labels: class of each image as an index into the class names, or None where there are no classes.
        max_broken: share of broken images above which `batches` raises.
        labels_match: an image's captions are right for every image of its class.
        names: of the images, as their source gives them, such as COCO's image_id; None = their positions.
    """

    source: ImageSource
    indices: Sequence[int]
    captions: list[list[str]]
    labels: list[int] | None = None
    max_broken: float = 0.0
    labels_match: bool = False
    names: list[str] | None = None
    broken: dict[str, int] = field(default_factory=dict)
    """Broken images met in the latest pass of `batches`, by reason."""

    def __len__(self) -> int:
        return len(self.indices)

    def raw_image(self, i: int) -> Image.Image:
        """Held-out image `i` as it is, RGB, for pictures; raises BrokenRecord."""
        return self.source.raw_image(self.indices[i])

    def batches(self, batch_size: int, image_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All held-out images in order: float32 [B, 3, S, S], and the int64 [B] indices of the images.

        Broken images are left out, so the indices tell which rows of `captions` and `labels` belong to the
        images.

        Raises:
            ValueError: `batch_size` or `image_size` below 1; more than `max_broken` of the images are broken.
        """
        tally = BrokenTally(self.max_broken, "the held-out images")
        for images, positions in image_batches(self.source, self.indices, batch_size, image_size, tally):
            yield images, torch.tensor(positions)
        self.broken = dict(tally.counts)
        tally.check(final=True)

    def raw_batches(self, batch_size: int) -> Iterator[tuple[list[Image.Image], list[int]]]:
        """As `batches`, the images as they are.

        Raises:
            ValueError: more than `max_broken` of the images are broken.
        """
        tally = BrokenTally(self.max_broken, "the held-out images")
        yield from raw_image_batches(self.source, self.indices, batch_size, tally)
        self.broken = dict(tally.counts)
        tally.check(final=True)


def by_image(source: ImageSource, identities: list[str], texts: list[str], max_broken: float) -> EvalSet:
    """Held-out images, each with all of its captions.

    Args:
        source: image i belongs to caption i.
        identities: which image each caption is of.
        texts: the captions.
        max_broken: share of broken images above which the set raises.
    """
    first: dict[str, int] = {}
    captions: dict[str, list[str]] = {}
    for i, (identity, text) in enumerate(zip(identities, texts, strict=True)):
        first.setdefault(identity, i)
        captions.setdefault(identity, []).append(text)
    indices, texts_of = list(first.values()), list(captions.values())
    return EvalSet(source, indices, texts_of, max_broken=max_broken, names=list(first))
