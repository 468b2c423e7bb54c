"""Image files with their texts: what tables and JSON files name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.base import EvalSet, PairSource, by_image, stable_hash
from mmcore.data.transforms.images import decode_rgb
from mmcore.ops import require

FILE = "file"
"""Where a picture that was read from a file has its name, in its `info`."""
Files = TypeVar("Files", bound="FilePairs")


@dataclass(frozen=True, repr=False)
class ImageFiles(PairSource):
    """Image files, each a sample."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def sample_id(self, i: int) -> str:
        return self.paths[i]

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        image = decode_rgb(read_image_file(self.paths[i]), least)
        image.info[FILE] = self.paths[i]
        return image


@dataclass(frozen=True)
class FilePairs(ImageFiles):
    """Image files with a text each, a caption or a question; samples of one image have the same identity."""

    identities: list[str]
    texts: list[str]

    def image_id(self, i: int) -> int:
        return stable_hash(self.identities[i])

    def all_captions(self, i: int) -> list[str]:
        return [self.texts[i]]

    def take(self: Files, indices: list[int]) -> Files:
        return type(self)(*([getattr(self, f.name)[i] for i in indices] for f in fields(self)))

    def held_out(self, max_broken: float) -> EvalSet:
        """All of them to measure a model on, each image with all of its captions."""
        return by_image(self, self.identities, self.texts, max_broken)


def some_of(names: Sequence[str]) -> Sequence[str]:
    """About a hundred of them, in which to look whether there are any."""
    return names[:: max(1, len(names) // 100)]


def real_paths(paths: Sequence[str]) -> list[str]:
    """The paths without symbolic links. Folders are listed for links: to ask for each file would take minutes."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    links: dict[str, str] = {}
    for folder in filter(os.path.isdir, set(folders.values())):
        with os.scandir(folder) as entries:
            links |= {entry.path: os.path.realpath(entry.path) for entry in entries if entry.is_symlink()}
    real = [os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths]
    return [links.get(path, path) for path in real]


def check_disjoint(train: Sequence[str], val: Sequence[str]) -> None:
    """A ValueError where training and held-out data share an image file."""
    shared = set(real_paths(train)) & set(real_paths(val)) - {""}  # of questions without an image
    what = "val_data must not share images with data, got {} in both, the first is {}"
    require("data", not shared, what, len(shared), min(shared, default=""))


def read_image_file(path: str) -> bytes:
    """Bytes of an image file; raises BrokenRecord where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise BrokenRecord("missing file") from None
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise BrokenRecord("unreadable file") from None
