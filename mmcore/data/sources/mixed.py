"""Several sources as one, and records drawn with replacement, as likely as their source says."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from mmcore.data.config import LoaderSpec
from mmcore.data.sources.base import Pair, PairSource, stable_hash
from mmcore.data.transforms.images import Preprocess
from mmcore.ops import require

SEPARATOR = "::"


@dataclass(frozen=True, repr=False)
class Mixed(PairSource):
    """The records of several sources, one source after the other."""

    sources: list[PairSource]

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, i: int) -> int:
        return int(np.searchsorted(self.ends, i, side="right"))

    def _of(self, i: int) -> tuple[PairSource, int]:
        place = self._place(i)
        return self.sources[place], i - int(self.ends[place - 1] if place else 0)

    def sample_id(self, i: int) -> str:
        source, at = self._of(i)
        return source.sample_id(at)

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        source, at = self._of(i)
        return source.raw_image(at, least)

    def image_id(self, i: int) -> int:
        source, at = self._of(i)
        return source.image_id(at)

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        source, at = self._of(i)
        return source.augment(at, preprocess, rng)

    def all_captions(self, i: int) -> list[str]:
        source, at = self._of(i)
        return source.all_captions(at)

    def caption(self, i: int, rng: np.random.Generator) -> str:
        source, at = self._of(i)
        return source.caption(at, rng)

    def answers(self, i: int) -> tuple[str, ...]:
        source, at = self._of(i)
        return source.answers(at)

    def question(self, i: int) -> str | None:
        source, at = self._of(i)
        return source.question(at)

    def label(self, i: int, caption: str) -> int:
        """Of a caption, in all sources alike; of a class, its source's own."""
        source, at = self._of(i)
        label = source.label(at, caption)
        is_class = type(source).label is not PairSource.label
        return stable_hash(f"class {self._place(i)}:{label}") if is_class else label


@dataclass(frozen=True, repr=False)
class Drawn:
    """`num_samples` records an epoch, drawn with replacement; records in random access for a `MapLoader`.

    A draw's number tells which record it is and which draw of the epoch, so that a record that is drawn twice is
    captioned and augmented anew.
    """

    source: PairSource
    num_samples: int
    weights: tuple[float, ...] | None = None  # of a record of each source of a `Mixed`; None = all alike

    def __len__(self) -> int:
        return self.num_samples

    def record(self, i: int) -> Pair:
        return self.source.record(i % len(self.source))

    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray:
        total = len(self.source)
        if self.weights is None:
            drawn = rng.integers(total, size=self.num_samples)
        else:
            sizes = np.diff([0, *_sizes(self.source)])
            shares = np.array(self.weights) * sizes
            places = rng.choice(len(sizes), size=self.num_samples, p=shares / shares.sum())
            starts = np.cumsum(sizes) - sizes
            drawn = starts[places] + (rng.random(self.num_samples) * sizes[places]).astype(np.int64)
        return np.arange(self.num_samples, dtype=np.int64) * total + drawn


def _sizes(source: PairSource) -> list[int]:
    return source.ends.tolist() if isinstance(source, Mixed) else [len(source)]


def parse_weights(text: str | None, num_sources: int) -> tuple[float, ...] | None:
    """Numbers such as '1::2::0.5', one of each source; raises ValueError for another number of them, or one that is not
    above 0."""
    if text is None:
        return None
    try:
        weights = tuple(float(part) for part in text.split(SEPARATOR))
    except ValueError:
        weights = ()
    what = "data_weights must be numbers above 0 with {} between them, one for each of {} sources of data, got {!r}"
    fits = len(weights) == num_sources and all(0 < weight < float("inf") for weight in weights)
    require("data", fits, what, SEPARATOR, num_sources, text)
    return weights
