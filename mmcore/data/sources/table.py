"""Pairs from a table of image paths and captions (open_clip's CSV form)."""

import csv
from collections import Counter
from pathlib import Path

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig
from mmcore.data.sources.base import EvalSet
from mmcore.data.sources.files import FilePairs, some_of
from mmcore.data.sources.split import split_pairs
from mmcore.ops import require

_SEPARATORS = {"\t": "\\t", ",": ",", ";": ";", "|": "|"}


def open_table(config: DataConfig, seed: int) -> tuple[FilePairs, EvalSet | None, Counter[str]]:
    """Training pairs, held-out pairs, and the counts of the broken lines of table `config.data`, with a `seed` of the
    split; raises ValueError for a missing table, a wrong column or separator, no image found, too many broken lines."""
    pairs, broken = _read_table(config.data, "data", config)
    if config.val_data is not None:
        is_other = Path(config.val_data).resolve() != Path(config.data).resolve()
        require("data", is_other, "val_data must not be the training table, got {!r}", config.val_data)
        val_pairs, broken_val = _read_table(config.val_data, "val_data", config)
        return pairs, val_pairs.held_out(config.max_broken), broken + broken_val
    train, val = split_pairs(pairs.paths, pairs.texts, config.val_fraction, seed)
    return pairs.take(train), pairs.take(val).held_out(config.max_broken) if val else None, broken


def _read_table(path: str, argument: str, config: DataConfig) -> tuple[FilePairs, Counter[str]]:
    table = Path(path)
    require("data", table.is_file(), "{} must be an existing file, got {!r}", argument, path)
    separator = "\t" if config.csv_separator == "\\t" else config.csv_separator
    require("data", len(separator) == 1, "csv_separator must be one character, got {!r}", config.csv_separator)
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
    require("data", bool(paths), "{}={!r} must hold at least one pair, got none", argument, path)
    probed = some_of(paths)
    what = (
        "the images of {}={!r} must be found by absolute paths or paths relative to its folder, but none of {} tried "
    )
    what += "exists, the first is {}"
    require("data", any(Path(p).is_file() for p in probed), what, argument, path, len(probed), paths[0])
    return FilePairs(paths, paths, texts), tally.counts


def _columns(header: list[str] | None, path: str, config: DataConfig) -> tuple[int, int]:
    """Positions of the image and the caption column."""
    if header is None:
        raise ValueError(f"data: {path} must begin with a line of column names, got an empty file")
    splitting = [shown for separator, shown in _SEPARATORS.items() if len(header) == 1 and separator in header[0]]
    hint = f"; --csv-separator '{splitting[0]}' would split it" if splitting else ""
    for name in ("csv_img_key", "csv_caption_key"):
        key = getattr(config, name)
        require("data", key in header, "{}={!r} must be a column of {}, which has {}{}", name, key, path, header, hint)
    return header.index(config.csv_img_key), header.index(config.csv_caption_key)


def _parse_row(row: list[str], num_columns: int, image_column: int, caption_column: int) -> tuple[str, str]:
    BrokenRecord.unless(len(row) == num_columns, "wrong number of columns")
    image, caption = row[image_column].strip(), row[caption_column].strip()
    BrokenRecord.unless(bool(image), "empty path")
    # other programs write a missing caption as nan; any other number is a caption, as "100" may be
    BrokenRecord.unless(caption.lower() not in ("", "nan"), "empty caption")
    return image, caption
