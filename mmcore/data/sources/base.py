"""What a source of pairs in random access gives, and the held-out pairs on top of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import LoaderSpec
from mmcore.data.transforms.images import Preprocess


class ImageSource(Protocol):
    """Images in random access, undecoded until asked for."""

    def sample_id(self, i: int) -> str: ...  # for logs
    # RGB; raises BrokenRecord. Of a larger JPEG, `least` pixels of the shorter side are enough
    def raw_image(self, i: int, least: int | None = None) -> Image.Image: ...


class TrainImages(ImageSource, Protocol):
    """Images to train on; picklable, and every method a pure function of its arguments."""

    # which image sample `i` shows, in 63 bits: equal for all captions of one image, in every process
    def image_id(self, i: int) -> int: ...
    # training view for a model, square, drawn by `rng`
    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image: ...


class PairSource(TrainImages, Protocol):
    """Training pairs in random access."""

    def __len__(self) -> int: ...
    def question(self, i: int) -> str | None: ...  # that the caption answers; None where captions stand alone
    def caption(self, i: int, rng: np.random.Generator) -> str: ...  # drawn by `rng` where there are several
    def all_captions(self, i: int) -> list[str]: ...  # every one that `caption` may draw
    def label(self, i: int, caption: str) -> int: ...  # pairs of equal labels are positives of each other


class Records(Protocol):
    """Records in random access; picklable, and `record` a pure function of its argument."""

    def __len__(self) -> int: ...
    def sample_id(self, i: int) -> str: ...  # for logs
    def record(self, i: int) -> Any: ...  # raises BrokenRecord
    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray: ...  # of an epoch, each record once


@dataclass
class Pair:
    """Pair `index` of a source, as a record: an image with a caption, or with a question and its answer."""

    source: PairSource
    index: int

    @property
    def id(self) -> str:
        return self.source.sample_id(self.index)

    @cached_property
    def image(self) -> Image.Image:
        """RGB; raises BrokenRecord."""
        return self.load()

    def load(self, least: int | None = None) -> Image.Image:
        """As `image`; of a larger JPEG, `least` pixels of the shorter side are enough."""
        return self.source.raw_image(self.index, least)

    @property
    def image_id(self) -> int:
        return self.source.image_id(self.index)

    @property
    def question(self) -> str | None:
        return self.source.question(self.index)

    def caption(self, rng: np.random.Generator) -> str:
        return self.source.caption(self.index, rng)

    def label(self, caption: str) -> int:
        return self.source.label(self.index, caption)

    def augment(self, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        return self.source.augment(self.index, preprocess, rng)


@dataclass(frozen=True)
class Pairs:
    """A PairSource as records, in an order drawn anew in each epoch."""

    source: PairSource

    def __len__(self) -> int:
        return len(self.source)

    def sample_id(self, i: int) -> str:
        return self.source.sample_id(i)

    def record(self, i: int) -> Pair:
        return Pair(self.source, i)

    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray:
        return rng.permutation(len(self.source))


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


class Measured:
    """Images that a model is measured on; the broken ones are left out and counted."""

    max_broken: float
    broken: dict[str, int]

    def _good_images(
        self, source: ImageSource, indices: Sequence[int], batch_size: int, what: str
    ) -> Iterator[tuple[list[Image.Image], list[int]]]:
        """RGB images of `source` at `indices` in order, with the positions in `indices` of each batch's."""
        if batch_size < 1:
            raise ValueError(f"data: batch_size must be at least 1, got {batch_size}")
        tally = BrokenTally(self.max_broken, what)
        images: list[Image.Image] = []
        positions: list[int] = []
        for position, i in enumerate(indices):
            with tally.record(source.sample_id(i)):
                images.append(source.raw_image(i))
                positions.append(position)
            if len(images) == batch_size:
                yield images, positions
                images, positions = [], []
        if images:
            yield images, positions
        self.broken = dict(tally.counts)
        tally.check(final=True)


@dataclass
class EvalSet(Measured):
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

    def batches(self, batch_size: int, preprocess: Preprocess) -> Iterator[tuple[Tensor, Tensor]]:
        """All held-out images in order: uint8 [B, 3, S, S], and the int64 [B] indices of the images.

        Broken images are left out, so the indices tell which rows of `captions` and `labels` belong to the
        images.

        Raises:
            ValueError: `batch_size` below 1; more than `max_broken` of the images are broken.
        """
        for images, positions in self.raw_batches(batch_size):
            yield preprocess(images), torch.tensor(positions)

    def raw_batches(self, batch_size: int) -> Iterator[tuple[list[Image.Image], list[int]]]:
        """As `batches`, the images as they are.

        Raises:
            ValueError: more than `max_broken` of the images are broken.
        """
        return self._good_images(self.source, self.indices, batch_size, "the held-out images")


def by_image(source: ImageSource, identities: list[str], texts: list[str], max_broken: float) -> EvalSet:
    """Held-out images, each with all of its captions: image i of `source` and identity i are those of caption i."""
    first: dict[str, int] = {}
    captions: dict[str, list[str]] = {}
    for i, (identity, text) in enumerate(zip(identities, texts, strict=True)):
        first.setdefault(identity, i)
        captions.setdefault(identity, []).append(text)
    indices, texts_of = list(first.values()), list(captions.values())
    return EvalSet(source, indices, texts_of, max_broken=max_broken, names=list(first))
