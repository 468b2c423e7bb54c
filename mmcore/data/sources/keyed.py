"""Pairs of records by key: rows of a table, JSON, JSONL, Parquet or a data set of Hugging Face, with captions under one
key or several."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig, LoaderSpec
from mmcore.data.sources.base import EvalSet, PairSource, stable_hash
from mmcore.data.sources.captions import CaptionKeys, Texts, parse_caption_keys
from mmcore.data.sources.files import read_image_file, real_paths, some_of
from mmcore.data.sources.split import split_linked
from mmcore.data.sources.table import read_rows
from mmcore.data.transforms.images import decode_rgb
from mmcore.ops import require

DEFAULT_KEYS = "caption"


class Rows(ABC):
    """Records in random access; picklable."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, row: int) -> str:
        """Of a record, for logs."""

    @abstractmethod
    def image(self, row: int) -> bytes:
        """An encoded image; raises BrokenRecord."""

    @abstractmethod
    def identity(self, row: int) -> str:
        """Which image it is."""

    @abstractmethod
    def texts(self, row: int) -> Texts:
        """Captions by key; raises BrokenRecord."""

    def groups(self, rows: np.ndarray) -> np.ndarray | None:
        """Of each row, the part of a file that is read at once; None where rows are read one by one."""
        return None


@dataclass(frozen=True, repr=False)
class KeyedPairs(PairSource):
    """Some of the rows, with captions drawn by the weights of their keys."""

    table: Rows
    rows: np.ndarray
    keys: CaptionKeys

    def __len__(self) -> int:
        return len(self.rows)

    def sample_id(self, i: int) -> str:
        return self.table.name(int(self.rows[i]))

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return decode_rgb(self.table.image(int(self.rows[i])), least)

    def image_id(self, i: int) -> int:
        return stable_hash(self.table.identity(int(self.rows[i])))

    def all_captions(self, i: int) -> list[str]:
        return [caption for captions in self.table.texts(int(self.rows[i])) for caption in captions]

    def caption(self, i: int, rng: np.random.Generator) -> str:
        return self.keys.draw(self.table.texts(int(self.rows[i])), rng)

    def order(self, rng: np.random.Generator, spec: LoaderSpec) -> np.ndarray:
        """Of rows that are read by groups, `WINDOW` groups at a time are mixed, so that they are read once an epoch."""
        groups = self.table.groups(self.rows)
        if groups is None:
            return rng.permutation(len(self))
        place = rng.permutation(int(groups.max()) + 1)
        return np.argsort(place[groups] // WINDOW + rng.random(len(self)), kind="stable")

    def take(self, indices: Iterable[int]) -> "KeyedPairs":
        return replace(self, rows=self.rows[np.fromiter(indices, dtype=np.int64)])

    def held_out(self, max_broken: float) -> EvalSet:
        """All of them to measure a model on, each image with all of its captions."""
        first: dict[str, int] = {}
        captions: dict[str, list[str]] = {}
        for i, row in enumerate(self.rows.tolist()):
            identity = self.table.identity(row)
            first.setdefault(identity, i)
            captions.setdefault(identity, []).extend(self.all_captions(i))
        distinct = [list(dict.fromkeys(texts)) for texts in captions.values()]
        return EvalSet(self, list(first.values()), distinct, max_broken=max_broken, names=list(first))


WINDOW = 8
"""Groups of rows that are mixed, and that a process keeps."""


@dataclass(frozen=True, repr=False)
class FileRows(Rows):
    """Image files with their captions, in memory."""

    paths: list[str]
    captions: list[Texts]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return self.paths[row]

    def image(self, row: int) -> bytes:
        return read_image_file(self.paths[row])

    def identity(self, row: int) -> str:
        return self.paths[row]

    def texts(self, row: int) -> Texts:
        return self.captions[row]


def caption_keys(config: DataConfig) -> CaptionKeys:
    return parse_caption_keys(DEFAULT_KEYS if config.caption_keys is None else config.caption_keys)


def split_keyed(pairs: KeyedPairs, config: DataConfig, seed: int) -> tuple[KeyedPairs, KeyedPairs | None]:
    """Training and held-out pairs; no image and no caption is on both sides."""
    if config.val_fraction == 0:
        return pairs, None
    identities = [pairs.table.identity(row) for row in pairs.rows.tolist()]
    if isinstance(pairs.table, FileRows):
        identities = real_paths(identities)
    keys = [
        [("image", identity), *(("caption", text) for text in pairs.all_captions(i))]
        for i, identity in enumerate(identities)
    ]
    train, val = split_linked(keys, config.val_fraction, seed)
    return pairs.take(train), pairs.take(val)


def read_files(config: DataConfig, path: str, argument: str) -> tuple[KeyedPairs, BrokenTally]:
    """Records of a table (.csv, .tsv), a JSON list or JSONL that name image files; raises ValueError for a missing
    file, a key that no record has, no image found, too many broken records."""
    file = Path(path).expanduser()
    require("data", file.is_file(), "{} must be an existing file, got {!r}", argument, path)
    is_table = file.suffix.lower() in (".csv", ".tsv")
    image_key = config.image_key or (config.csv_img_key if is_table else "image")
    for key, other in (("csv_img_key", "image_key"), ("csv_caption_key", "caption_keys")):
        given = getattr(config, other) is not None and getattr(config, key) != getattr(DataConfig, key)
        require("data", not given, "{} has no effect beside {}, got {!r}", key, other, getattr(config, key))
    keys = caption_keys(config)
    if is_table and config.caption_keys is None:
        keys = CaptionKeys((config.csv_caption_key,), (1.0,))
    root = file.parent if config.image_root is None else Path(config.image_root).expanduser()
    tally = BrokenTally(config.max_broken, f"{argument}={path!r}")
    paths: list[str] = []
    captions: list[Texts] = []
    seen: set[str] = set()
    for number, record in _table_records(path, argument, config) if is_table else _json_records(file, argument):
        with tally.record(f"{file.name}:{number}"):
            BrokenRecord.unless(isinstance(record, dict), "record is not an object")
            seen |= record.keys()
            image = record.get(image_key)
            if not isinstance(image, str) or not image.strip():
                raise BrokenRecord(f"no {image_key}")
            captions.append(keys.read(record))
            paths.append(os.path.join(root, image.strip()))
    check_keys((image_key, *keys.keys), seen, f"{argument}={path!r}")
    tally.check(final=True)
    require("data", bool(paths), "{}={!r} must hold at least one pair, got none", argument, path)
    probed = some_of(paths)
    what = "the images of {}={!r} must be found by their paths or in image_root, but none of {} tried exists: {}"
    require("data", any(map(os.path.isfile, probed)), what, argument, path, len(probed), paths[0])
    return KeyedPairs(FileRows(paths, captions), np.arange(len(paths)), keys), tally


def file_paths(pairs: KeyedPairs) -> list[str]:
    """Of the images, where they are files."""
    return pairs.table.paths if isinstance(pairs.table, FileRows) else []


def check_keys(wanted: Iterable[str], there: Iterable[str], what: str) -> None:
    """A ValueError of a key that no record has."""
    known = sorted(there)
    for key in wanted:
        sentence = "image_key and caption_keys must be keys of {}, which has {}, got {!r}"
        require("data", key in known, sentence, what, known[:20], key)


def _table_records(path: str, argument: str, config: DataConfig) -> Iterable[tuple[int, Any]]:
    rows = read_rows(path, argument, config)
    _, header = next(rows, (0, []))
    for number, row in rows:
        # what a missing text is written as by other programs
        values = [None if value.strip().lower() == "nan" else value for value in row]
        yield number, dict(zip(header, values, strict=True)) if len(row) == len(header) else None


def _json_records(file: Path, argument: str) -> Iterable[tuple[int, Any]]:
    try:
        if file.suffix.lower() == ".jsonl":
            with file.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, _parsed(line)
            return
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"data: {argument}={str(file)!r} must be JSON in UTF-8, got: {error}") from None
    what = "{}={!r} must hold a list of records, got {}"
    require("data", isinstance(content, list), what, argument, str(file), type(content).__name__)
    yield from enumerate(content)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
