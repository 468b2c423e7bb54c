"""Webdataset shards in random access: an index of where each member lies, made once.

Batches of indexed shards depend on the global batch alone, so that a run goes on at another number of ranks, and shards
mix with other sources.
"""

import fcntl
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmcore import checkpoint
from mmcore.data.broken import BrokenRecord
from mmcore.data.sources import tar
from mmcore.data.sources.base import PairSource, stable_hash
from mmcore.data.sources.captions import CaptionKeys
from mmcore.data.transforms.images import decode_rgb
from mmcore.ops import require

_MEMBERS = ("image", tar.CAPTION_SUFFIX, tar.METADATA_SUFFIX)
_WIDTH = 1 + 2 * len(_MEMBERS)
_FORMAT = 1


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of each sample lie; its arrays stay on disk and are mapped into memory.

    Args:
        folder: with `index.json`, `places.npy` (a row a sample: its shard, then first byte and length of image, caption
            and metadata, -1 = there is none), `keys.npy` (all keys, one after the other) and `key_ends.npy`.
        shards: paths of the shards, in the order of their numbers.
    """

    folder: str
    shards: list[str]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "shards": self.shards}

    @cached_property
    def places(self) -> np.ndarray:
        return np.load(Path(self.folder) / "places.npy", mmap_mode="r")

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        folder = Path(self.folder)
        return np.load(folder / "keys.npy", mmap_mode="r"), np.load(folder / "key_ends.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.places)

    def key(self, i: int) -> str:
        """Of a sample."""
        text, ends = self._keys
        return bytes(text[int(ends[i - 1]) if i else 0 : int(ends[i])]).decode(errors="surrogateescape")

    def shard(self, i: int) -> str:
        return self.shards[int(self.places[i, 0])]

    def read(self, i: int, member: str) -> bytes | None:
        """A member's bytes, None where the sample has none; raises BrokenRecord where the shard cannot be read."""
        at = 1 + 2 * _MEMBERS.index(member)
        offset, size = (int(x) for x in self.places[i, at : at + 2])
        if offset < 0:
            return None
        try:
            return tar.read_range(self.shard(i), offset, size)
        except OSError:
            raise BrokenRecord("unreadable shard") from None


@dataclass(frozen=True, repr=False)
class IndexedPairs(PairSource):
    """The samples of indexed shards that have an image and a caption."""

    index: ShardIndex
    keys: CaptionKeys

    def __len__(self) -> int:
        return len(self.index)

    def sample_id(self, i: int) -> str:
        return f"{Path(self.index.shard(i)).name}:{self.index.key(i)}"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        data = self.index.read(i, "image")
        if data is None:
            raise BrokenRecord("no image")
        return decode_rgb(data, least)

    def _sample(self, i: int, *members: str) -> tar.Sample:
        read = {member: self.index.read(i, member) for member in members}
        found: tar.Sample = {member: data for member, data in read.items() if data is not None}
        return found | {"__key__": self.index.key(i), "__url__": self.index.shard(i)}

    def image_id(self, i: int) -> int:
        return stable_hash(tar.image_identity(self._sample(i, tar.METADATA_SUFFIX)))

    def _texts(self, i: int) -> list[list[str]]:
        sample = self._sample(i, *tar.suffixes_of(self.keys))
        BrokenRecord.unless(self.keys != tar.TXT or tar.CAPTION_SUFFIX in sample, "no caption")
        return tar.read_texts(sample, self.keys)

    def all_captions(self, i: int) -> list[str]:
        return [caption for captions in self._texts(i) for caption in captions]

    def caption(self, i: int, rng: np.random.Generator) -> str:
        return self.keys.draw(self._texts(i), rng)


def open_index(folder: Path, shards: list[str]) -> ShardIndex:
    """The index of local shards in `folder`, made there where it is absent: whole or not at all, by one of the
    processes that ask for it.

    Raises ValueError for remote, compressed or damaged shards, and for an index of other shards or of shards that were
    changed since.
    """
    remote = next(filter(tar.is_remote, shards), None)
    require("data", remote is None, "shard_index must be of shards that are files, got {!r}", remote)
    folder = folder.expanduser()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():  # another process may have been here while this one waited
                _write(folder, shards)
    file = folder / "index.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        described, is_known = known["shards"], known["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"data: shard_index must be a new folder or an index of shards, got {str(folder)!r}") from None
    what = "shard_index must be of this version, got {!r} of another: remove it, and it is made anew"
    require("data", is_known, what, str(folder))
    now = [_described(shard) for shard in shards]
    what = "shard_index must be of the {} shards of --data, got {!r} of {} others: give another folder"
    names, theirs = ([shard["name"] for shard in of] for of in (now, described))
    require("data", names == theirs, what, len(shards), str(folder), len(theirs))
    stale = [shard["name"] for shard, then in zip(now, described, strict=True) if shard != then]
    what = "shard_index {!r} must be as new as its shards, but {} of {} changed since it was made, the first is {}: "
    what += "remove it, and it is made anew"
    require("data", not stale, what, str(folder), len(stale), len(shards), *stale[:1])
    return ShardIndex(str(folder), shards)


def _described(shard: str) -> dict[str, Any]:
    found = os.stat(shard)
    return {"name": Path(shard).name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _write(folder: Path, shards: list[str]) -> None:
    """Reads the headers of all shards."""
    described = [_described(shard) for shard in shards]
    places: list[np.ndarray] = []
    keys: list[bytes] = []
    console = Console(stderr=True)
    options: Any = {"console": console, "transient": True, "disable": not console.is_terminal}
    for number, shard in enumerate(track(shards, "index of shards", **options)):
        rows = []
        for sample in tar.index_shard(shard, None, " to be indexed"):
            members = (tar.image_of(sample), *(sample.get(name) for name in _MEMBERS[1:]))
            rows.append([number, *(x for place in members for x in (place[1:] if place else (-1, 0)))])
            keys.append(sample["__key__"].encode(errors="surrogateescape"))
        places.append(np.array(rows, dtype=np.int64).reshape(-1, _WIDTH))
    table = np.concatenate(places)
    what = "shards must hold images (.jpg, .png, .webp) with a .txt or .json of the same name to be indexed, got none"
    require("data", len(table) > 0, what)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".index-") as temporary:
        staged = Path(temporary) / "index"
        staged.mkdir()
        np.save(staged / "places.npy", table)
        np.save(staged / "keys.npy", np.frombuffer(b"".join(keys), dtype=np.uint8))
        np.save(staged / "key_ends.npy", np.cumsum([len(key) for key in keys], dtype=np.int64))
        checkpoint.write_json(staged / "index.json", {"format": _FORMAT, "shards": described})
        staged.rename(folder)
