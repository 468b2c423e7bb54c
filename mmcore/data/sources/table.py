"""Pairs from a table of image paths and captions (open_clip's CSV form)."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig
from mmcore.data.sources.base import EvalSet
from mmcore.data.sources.files import FilePairs
from mmcore.data.sources.split import split_pairs

_SEPARATORS = {"\t": "\\t", ",": ",", ";": ";", "|": "|"}
_NUM_PROBED = 100


def open_table(config: DataConfig, seed: int) -> tuple[FilePairs, EvalSet | None, Counter[str]]:
    """Training pairs, held-out pairs, and the counts of the broken lines of table `config.data`.

    Args:
        config: `data`, `val_data` or `val_fraction`, and the three `csv_*` settings.
        seed: seed of the split.

    Raises:
        ValueError: a missing table, a wrong column or separator, no image found, too many broken lines.
    """
    pairs, broken = _read_table(config.data, "data", config)
    if config.val_data is not None:
        if Path(config.val_data).resolve() == Path(config.data).resolve():
            raise ValueError(f"data: val_data must not be the training table, got {config.val_data!r}")
        val_pairs, broken_val = _read_table(config.val_data, "val_data", config)
        return pairs, val_pairs.held_out(config.max_broken), broken + broken_val
    train, val = split_pairs(pairs.paths, pairs.texts, config.val_fraction, seed)
    return pairs.take(train), pairs.take(val).held_out(config.max_broken) if val else None, broken


def _read_table(path: str, argument: str, config: DataConfig) -> tuple[FilePairs, Counter[str]]:
    table = Path(path)
    if not table.is_file():
        raise ValueError(f"data: {argument} must be an existing file, got {path!r}")
    separator = "\t" if config.csv_separator == "\\t" else config.csv_separator
    if len(separator) != 1:
        raise ValueError(f"data: csv_separator must be one character, got {config.csv_separator!r}")
    tally = BrokenTally(config.max_broken, f"{argument}={path!r}")
    paths: list[str] = []
    texts: list[str] = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=separator)
            header = next(reader, None)
            image_column, caption_column = _columns(header, path, config)
            for row in reader:
                if not row:
                    continue
                with tally.record(f"{table.name}:{reader.line_num}"):
                    image, caption = _parse_row(row, len(header or ()), image_column, caption_column)
                    # Joining keeps an absolute path as it is.
                    paths.append(str(table.parent / image))
                    texts.append(caption)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"data: {argument}={path!r} must be a table in UTF-8, got: {error}") from None
    tally.check(final=True)
    if not paths:
        raise ValueError(f"data: {argument}={path!r} must hold at least one pair, got none")
    _check_some_exist(paths, f"{argument}={path!r}")
    return FilePairs(paths, paths, texts), tally.counts


def _columns(header: list[str] | None, path: str, config: DataConfig) -> tuple[int, int]:
    """Positions of the image and the caption column."""
    if header is None:
        raise ValueError(f"data: {path} must begin with a line of column names, got an empty file")
    for name, key in (("csv_img_key", config.csv_img_key), ("csv_caption_key", config.csv_caption_key)):
        if key not in header:
            hint = ""
            if len(header) == 1:
                found = [s for s in _SEPARATORS if len(header[0].split(s)) > 1]
                hint = f"; --csv-separator '{_SEPARATORS[found[0]]}' would split it" if found else ""
            raise ValueError(f"data: {name}={key!r} must be a column of {path}, which has {header}{hint}")
    return header.index(config.csv_img_key), header.index(config.csv_caption_key)


def _parse_row(row: list[str], num_columns: int, image_column: int, caption_column: int) -> tuple[str, str]:
    if len(row) != num_columns:
        raise BrokenRecord("wrong number of columns")
    image, caption = row[image_column].strip(), row[caption_column].strip()
    if not image:
        raise BrokenRecord("empty path")
    # other programs write a missing caption as nan; any other number is a caption, as "100" may be
    if not caption or caption.lower() == "nan":
        raise BrokenRecord("empty caption")
    return image, caption


def _check_some_exist(paths: list[str], what: str) -> None:
    probed = paths[:: max(1, len(paths) // _NUM_PROBED)]
    if not any(Path(p).is_file() for p in probed):
        raise ValueError(
            f"data: the images of {what} must be found by absolute paths or paths relative to its folder, "
            f"but none of {len(probed)} tried exists, the first is {paths[0]}"
        )
