"""What a source of pairs in random access gives, and the held-out pairs on top of it."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import LoaderSpec
from mmcore.data.transforms.images import Preprocess, training_view
from mmcore.ops import require


class ImageSource(Protocol):
    """Images in random access, undecoded until asked for."""

    def sample_id(self, i: int) -> str: ...  # for logs
    # RGB; raises BrokenRecord. Of a larger JPEG, `least` pixels of the shorter side are enough
    def raw_image(self, i: int, least: int | None = None) -> Image.Image: ...


class Records(Protocol):
    """Records in random access; picklable, and `record` a pure function of its argument."""

    def __len__(self) -> int: ...
    def record(self, i: int) -> Any: ...  # has an `id`, for logs
    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray: ...  # of an epoch, each record once


class PairSource(ABC):
    """Training pairs in random access, `Records` in an order drawn anew in each epoch and an `ImageSource`; picklable,
    and every method a pure function of its arguments."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, i: int) -> str: ...

    @abstractmethod
    def raw_image(self, i: int, least: int | None = None) -> Image.Image: ...

    @abstractmethod
    def image_id(self, i: int) -> int:
        """Which image sample `i` shows, in 63 bits: equal for all captions of one image, in every process."""

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        """Training view for a model, square, drawn by `rng`."""
        return training_view(partial(self.raw_image, i), preprocess, rng)

    @abstractmethod
    def all_captions(self, i: int) -> list[str]:
        """Every caption that may be drawn."""

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """One of them; of a single one, no random number is drawn."""
        captions = self.all_captions(i)
        return captions[int(rng.integers(len(captions)))]

    def question(self, i: int) -> str | None:
        """That the caption answers; None where captions stand alone."""
        return None

    def answers(self, i: int) -> tuple[str, ...]:
        """That people gave to the question, repeats included; none where captions stand alone."""
        return ()

    def label(self, i: int, caption: str) -> int:
        """Pairs of equal labels are positives of each other."""
        return stable_hash(caption)

    def record(self, i: int) -> "Pair":
        return Pair(self, i)

    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray:
        return rng.permutation(len(self))


@dataclass(frozen=True)
class OtherPictures(PairSource):
    """The captions of a source beside pictures of other records of it: what a model learns without pictures."""

    source: PairSource
    other: list[int]  # whose picture each caption is shown with

    def __len__(self) -> int:
        return len(self.source)

    @property
    def classes(self) -> list[int] | None:
        """Of the captions, where the source has classes."""
        return getattr(self.source, "classes", None)

    def sample_id(self, i: int) -> str:
        return f"{self.source.sample_id(i)} (picture of {self.source.sample_id(self.other[i])})"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return self.source.raw_image(self.other[i], least)

    def image_id(self, i: int) -> int:
        return self.source.image_id(self.other[i])

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        return self.source.augment(self.other[i], preprocess, rng)

    def all_captions(self, i: int) -> list[str]:
        return self.source.all_captions(i)

    def question(self, i: int) -> str | None:
        return self.source.question(i)

    def answers(self, i: int) -> tuple[str, ...]:
        return self.source.answers(i)

    def label(self, i: int, caption: str) -> int:
        return self.source.label(i, caption)


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

    @property
    def answers(self) -> tuple[str, ...]:
        return self.source.answers(self.index)

    def caption(self, rng: np.random.Generator) -> str:
        return self.source.caption(self.index, rng)

    def label(self, caption: str) -> int:
        return self.source.label(self.index, caption)

    def augment(self, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        return self.source.augment(self.index, preprocess, rng)


def stable_hash(text: str) -> int:
    """63 bits of the BLAKE2 hash of a caption or an image's name, the same in every process."""
    # Names of files may hold lone surrogates, which stand for bytes that are not UTF-8.
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def parse_image_id(value: object) -> str | None:
    """An image_id as JSON gives it, as text, None where it is absent; raises BrokenRecord for neither text nor a whole
    number."""
    if value is None:
        return None
    is_id = isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    BrokenRecord.unless(is_id, "image_id is neither text nor a whole number")
    return str(value)


class Measured(ABC):
    """Images that a model is measured on, by position; the broken ones are left out and counted."""

    max_broken: float
    broken: dict[str, int]
    what: str  # they are, for messages

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, i: int) -> str: ...

    @abstractmethod
    def raw_image(self, i: int, least: int | None = None) -> Image.Image: ...

    def read(self, positions: Iterable[int]) -> tuple[list[Image.Image], list[int], list[tuple[str, str]]]:
        """Images that are good, RGB; their positions; the name and the reason of each other one."""
        images, good, broken = [], [], []
        for i in positions:
            try:
                images.append(self.raw_image(i))
                good.append(i)
            except BrokenRecord as error:
                broken.append((self.sample_id(i), error.reason))
        return images, good, broken

    def check_broken(self, seen: int, broken: Iterable[tuple[str, str]]) -> None:
        """Counts those among the first `seen` images; a ValueError of more than `max_broken`."""
        tally = BrokenTally(self.max_broken, self.what)
        tally.add(seen, broken)
        self.broken = dict(tally.counts)
        tally.check(final=seen == len(self))

    def _good_images(self, batch_size: int) -> Iterator[tuple[list[Image.Image], list[int]]]:
        """Of `batch_size` positions at a time."""
        require("data", batch_size >= 1, "batch_size must be at least 1, got {}", batch_size)
        broken: list[tuple[str, str]] = []
        for first in range(0, len(self), batch_size):
            images, positions, more = self.read(range(first, min(first + batch_size, len(self))))
            broken += more
            if images:
                yield images, positions
        self.check_broken(len(self), broken)


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
        languages: of each caption of each image; None = they are of one.
    """

    source: ImageSource
    indices: Sequence[int]
    captions: list[list[str]]
    labels: list[int] | None = None
    max_broken: float = 0.0
    labels_match: bool = False
    names: list[str] | None = None
    languages: list[list[str]] | None = None
    broken: dict[str, int] = field(default_factory=dict)
    """Broken images met in the latest pass, by reason."""
    what = "the held-out images"

    def __len__(self) -> int:
        return len(self.indices)

    def sample_id(self, i: int) -> str:
        return self.source.sample_id(self.indices[i])

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        """Held-out image `i` as it is, RGB; raises BrokenRecord."""
        return self.source.raw_image(self.indices[i], least)

    def batches(self, batch_size: int, preprocess: Preprocess) -> Iterator[tuple[Tensor, Tensor]]:
        """All held-out images in order, less the broken ones: uint8 [B, 3, S, S], and their int64 [B] indices, as of
        `captions` and `labels`.

        Raises:
            ValueError: `batch_size` below 1; more than `max_broken` of the images are broken.
        """
        for images, positions in self.raw_batches(batch_size):
            yield preprocess(images), torch.tensor(positions)

    def raw_batches(self, batch_size: int) -> Iterator[tuple[list[Image.Image], list[int]]]:
        """As `batches`, the images as they are."""
        return self._good_images(batch_size)


def by_image(source: ImageSource, identities: list[str], texts: list[str], max_broken: float) -> EvalSet:
    """Held-out images, each with all of its captions: image i of `source` and identity i are those of caption i."""
    first: dict[str, int] = {}
    captions: dict[str, list[str]] = {}
    for i, (identity, text) in enumerate(zip(identities, texts, strict=True)):
        first.setdefault(identity, i)
        captions.setdefault(identity, []).append(text)
    indices, texts_of = list(first.values()), list(captions.values())
    return EvalSet(source, indices, texts_of, max_broken=max_broken, names=list(first))
