"""Image files, with or without captions: what tables and JSON files name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.base import EvalSet, by_image, stable_hash
from mmcore.data.transforms.images import Preprocess, decode_rgb, training_view

Files = TypeVar("Files", bound="ImageFiles")


@dataclass(frozen=True)
class ImageFiles:
    """Image files, as TrainImages; samples of one image have the same identity."""

    paths: list[str]
    identities: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def sample_id(self, i: int) -> str:
        return self.paths[i]

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return decode_rgb(read_image_file(self.paths[i]), least)

    def image_id(self, i: int) -> int:
        return stable_hash(self.identities[i])

    def augment(self, i: int, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        return training_view(partial(self.raw_image, i), preprocess, rng)

    def take(self: Files, indices: list[int]) -> Files:
        """The samples at `indices`."""
        kept = {f.name: [getattr(self, f.name)[i] for i in indices] for f in fields(self)}
        return type(self)(**kept)


@dataclass(frozen=True)
class FilePairs(ImageFiles):
    """Image files with a caption each, as a PairSource; equal captions are positives of each other."""

    texts: list[str]

    def question(self, i: int) -> None:
        return None

    def caption(self, i: int, rng: np.random.Generator) -> str:
        return self.texts[i]

    def all_captions(self, i: int) -> list[str]:
        return [self.texts[i]]

    def label(self, i: int, caption: str) -> int:
        return stable_hash(caption)

    def held_out(self, max_broken: float) -> EvalSet:
        """All of them to measure a model on, each image with all of its captions."""
        return by_image(self, self.identities, self.texts, max_broken)


def read_image_file(path: str) -> bytes:
    """Bytes of an image file; raises BrokenRecord where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise BrokenRecord("missing file") from None
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise BrokenRecord("unreadable file") from None
