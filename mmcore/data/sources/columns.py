"""Records by column: Parquet files, and data sets that Hugging Face's `datasets` saved to disk.

pyarrow and datasets are imported where such data is read, and not before: no other source needs them.
"""

import glob
import importlib
import importlib.util
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmcore.data.broken import BrokenRecord
from mmcore.data.config import DataConfig
from mmcore.data.sources.captions import CaptionKeys, Texts
from mmcore.data.sources.files import read_image_file
from mmcore.data.sources.keyed import WINDOW, KeyedPairs, Rows, caption_keys, check_keys
from mmcore.ops import require

HF_FILES = ("state.json", "dataset_dict.json")
"""Of a folder that `save_to_disk` wrote: one split, or several."""


def is_parquet(data: str) -> bool:
    """Whether `data` names Parquet files: one, a pattern of them, or a folder with them."""
    folder = Path(data).expanduser()
    return data.lower().endswith(".parquet") or (folder.is_dir() and any(folder.glob("*.parquet")))


def is_hf(data: str) -> bool:
    """Whether `data` is a folder that `datasets.Dataset.save_to_disk` wrote."""
    return any((Path(data).expanduser() / name).is_file() for name in HF_FILES)


@dataclass(frozen=True, repr=False)
class ColumnRows(Rows):
    """Rows whose image is a path, encoded bytes, or a struct of both."""

    root: str
    """Folder of images that are paths."""
    image_key: str
    keys: CaptionKeys

    def name(self, row: int) -> str:
        return f"{self.what}:{row}"

    @property
    def what(self) -> str:
        """Of the data, for logs."""
        raise NotImplementedError

    def value(self, row: int, *columns: str) -> dict[str, Any]:
        """Of a row, some columns."""
        raise NotImplementedError

    def has_paths(self) -> bool:
        """Whether images are paths; else each row has one of its own."""
        raise NotImplementedError

    def image(self, row: int) -> bytes:
        value = self.value(row, self.image_key)[self.image_key]
        path = value
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(path, str) or not path:
            raise BrokenRecord(f"no {self.image_key}")
        return read_image_file(os.path.join(self.root, path))

    def identity(self, row: int) -> str:
        if self.has_paths():
            return os.path.join(self.root, str(self.value(row, self.image_key)[self.image_key]))
        return self.name(row)

    def texts(self, row: int) -> Texts:
        return self.keys.read(self.value(row, *self.keys.keys))


@dataclass(frozen=True, repr=False)
class ParquetRows(ColumnRows):
    """Rows of Parquet files, of which a process keeps the row groups that it read last."""

    files: list[str]
    parts: list[tuple[int, int]]  # file and row group
    starts: np.ndarray  # of each row group its first row, and behind the last the number of rows
    are_paths: bool = False
    _kept: OrderedDict[tuple[int, tuple[str, ...]], Any] = field(default_factory=OrderedDict, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": OrderedDict()}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def what(self) -> str:
        return Path(self.files[0]).name if len(self.files) == 1 else str(Path(self.files[0]).parent)

    def has_paths(self) -> bool:
        return self.are_paths

    def groups(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def value(self, row: int, *columns: str) -> dict[str, Any]:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        table = self._kept.get((part, columns))
        if table is None:
            file, group = self.parts[part]
            try:
                table = _pyarrow("pyarrow.parquet").ParquetFile(self.files[file]).read_row_group(group, list(columns))
            except (OSError, ValueError):  # pyarrow's errors are both
                raise BrokenRecord("damaged row group") from None
            self._kept[part, columns] = table
            while len(self._kept) > 2 * WINDOW:
                self._kept.popitem(last=False)
        self._kept.move_to_end((part, columns))
        offset = row - int(self.starts[part])
        return {name: table.column(name)[offset].as_py() for name in columns}


@dataclass(frozen=True, repr=False)
class HFRows(ColumnRows):
    """Rows of a data set on disk, mapped into memory by `datasets`."""

    folder: str

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("data", "columns")}

    @cached_property
    def data(self) -> Any:
        """As `datasets` loads it, images undecoded."""
        datasets = _datasets()
        data = datasets.load_from_disk(self.folder)
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
        return data

    @cached_property
    def columns(self) -> dict[tuple[str, ...], Any]:
        """The data set cut to the columns that were asked for."""
        return {}

    @property
    def what(self) -> str:
        return Path(self.folder).name

    def has_paths(self) -> bool:
        return getattr(self.data.features[self.image_key], "dtype", None) == "string"

    def __len__(self) -> int:
        return len(self.data)

    def value(self, row: int, *columns: str) -> dict[str, Any]:
        if columns not in self.columns:
            self.columns[columns] = self.data.select_columns(list(columns))
        found = self.columns[columns][row]
        for name in columns:
            feature = self.data.features[name]
            if hasattr(feature, "int2str") and isinstance(found[name], int):  # a class, by its name
                found[name] = feature.int2str(found[name]) if found[name] >= 0 else None
        return found


def open_parquet(config: DataConfig, data: str, argument: str) -> KeyedPairs:
    """All rows of the Parquet files that `data` names; raises ValueError for none, files without the keys of images and
    captions, or other columns in one of them."""
    files, keys = _parquet_files(data, argument), caption_keys(config)
    module, image_key = _pyarrow("pyarrow.parquet"), config.image_key or "image"
    parts: list[tuple[int, int]] = []
    sizes: list[int] = []
    is_path = False
    for number, file in enumerate(files):
        try:
            opened = module.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"data: {argument} must be Parquet, got {file}: {error}") from None
        check_keys((image_key, *keys.keys), opened.schema_arrow.names, file)
        is_path = str(opened.schema_arrow.field(image_key).type) in ("string", "large_string")
        for group in range(opened.num_row_groups):
            parts.append((number, group))
            sizes.append(opened.metadata.row_group(group).num_rows)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    require("data", int(starts[-1]) > 0, "{}={!r} must hold at least one row, got none", argument, data)
    root = config.image_root or str(Path(files[0]).parent)
    rows = ParquetRows(root, image_key, keys, files, parts, starts, is_path)
    return KeyedPairs(rows, np.arange(len(rows)), keys)


def open_hf(config: DataConfig, data: str, argument: str) -> KeyedPairs:
    """All rows of a data set on disk; raises ValueError for a folder of several splits, or keys that it has not."""
    folder, keys, image_key = Path(data).expanduser(), caption_keys(config), config.image_key or "image"
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    what = "{}={!r} must be one split of a data set on disk, got the folder of {}"
    require("data", not (folder / "dataset_dict.json").is_file(), what, argument, data, ", ".join(splits))
    rows = HFRows(config.image_root or str(folder), image_key, keys, str(folder))
    try:
        names = rows.data.column_names
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"data: {argument}={data!r} must be a data set on disk, got: {error}") from None
    check_keys((image_key, *keys.keys), names, f"{argument}={data!r}")
    require("data", len(rows) > 0, "{}={!r} must hold at least one row, got none", argument, data)
    return KeyedPairs(rows, np.arange(len(rows)), keys)


def _parquet_files(data: str, argument: str) -> list[str]:
    expanded = os.path.expanduser(data)
    if os.path.isdir(expanded):
        files = sorted(glob.glob(os.path.join(glob.escape(expanded), "*.parquet")))
    elif "{" in expanded:
        from webdataset.shardlists import expand_urls  # noqa: PLC0415 (see `mmcore.data.sources.tar`)

        files = expand_urls(expanded)
    else:
        files = sorted(glob.glob(expanded)) or [expanded]
    missing = [file for file in files if not os.path.isfile(file)]
    what = "{}={!r} must name existing Parquet files, got {}"
    require("data", bool(files) and not missing, what, argument, data, missing[0] if missing else "none")
    return files


def _pyarrow(module: str) -> Any:
    return _installed("pyarrow", "Parquet files", module)


def _datasets() -> Any:
    return _installed("datasets", "data sets of Hugging Face on disk", "datasets")


def _installed(package: str, what: str, module: str) -> Any:
    found = importlib.util.find_spec(package) is not None
    require("data", found, "{} must be read by {}, which is not here: pip install {}", what, package, package)
    return importlib.import_module(module)
