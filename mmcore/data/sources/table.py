"""Pairs from a table of image paths and captions (open_clip's CSV form)."""

import csv
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig
from mmcore.data.sources.base import EvalSet
from mmcore.data.sources.files import FilePairs, check_disjoint, real_paths, some_of
from mmcore.data.sources.split import split_pairs
from mmcore.ops import require

_FILE = re.compile(r"\S.*\.[A-Za-z]{2,5}")
_MOST_LINES = 100  # of a caption in quotes
_SEPARATORS = {"\t": "\\t", ",": ",", ";": ";", "|": "|"}


def open_table(config: DataConfig, seed: int) -> tuple[FilePairs, EvalSet | None, Counter[str]]:
    """Training pairs, held-out pairs, and the counts of the broken lines of table `config.data`, with a `seed` of the
    split; raises ValueError for a missing table, a wrong column or separator, no image found, too many broken lines."""
    pairs, broken = _read_table(config.data, "data", config)
    if config.val_data is not None:
        is_other = Path(config.val_data).resolve() != Path(config.data).resolve()
        require("data", is_other, "val_data must not be the training table, got {!r}", config.val_data)
        val_pairs, broken_val = _read_table(config.val_data, "val_data", config)
        check_disjoint(pairs.paths, val_pairs.paths)
        return pairs, val_pairs.held_out(config.max_broken), broken + broken_val
    train, val = split_pairs(real_paths(pairs.paths), pairs.texts, config.val_fraction, seed)
    return pairs.take(train), pairs.take(val).held_out(config.max_broken) if val else None, broken


def _read_table(path: str, argument: str, config: DataConfig) -> tuple[FilePairs, Counter[str]]:
    table = Path(path)
    tally = BrokenTally(config.max_broken, f"{argument}={path!r}")
    paths: list[str] = []
    texts: list[str] = []
    rows = read_rows(path, argument, config)
    _, header = next(rows, (0, None))
    image_column, caption_column = _columns(header, path, config)
    for number, row in rows:
        with tally.record(f"{table.name}:{number}"):
            image, caption = _parse_row(row, len(header or ()), image_column, caption_column)
            # Joining keeps an absolute path as it is.
            paths.append(str(table.parent / image))
            texts.append(caption)
    tally.check(final=True)
    require("data", bool(paths), "{}={!r} must hold at least one pair, got none", argument, path)
    probed = some_of(paths)
    what = "the images of {}={!r} must be found by absolute paths or paths relative to its folder, but none of "
    what += "{} tried exists, the first is {}"
    require("data", any(Path(p).is_file() for p in probed), what, argument, path, len(probed), paths[0])
    return FilePairs(paths, paths, texts), tally.counts


def read_rows(path: str, argument: str, config: DataConfig) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table with the numbers of their lines, its header first; raises ValueError for a missing file, a
    separator of more than one character, or what is no table."""
    table = Path(path)
    require("data", table.is_file(), "{} must be an existing file, got {!r}", argument, path)
    separator = "\t" if config.csv_separator == "\\t" else config.csv_separator
    require("data", len(separator) == 1, "csv_separator must be one character, got {!r}", config.csv_separator)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            yield from _rows(file, separator)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"data: {argument}={path!r} must be a table in UTF-8, got: {error}") from None


def _rows(file: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each with the number of its last line; empty lines are none.

    A field in quotes may go on over several lines. A quote that nothing closes, or that would swallow lines which are
    rows of their own, is a quote mark of its caption.
    """
    lines, number, num_columns = deque[str](), 0, 0
    source = iter(file)
    while (line := lines.popleft() if lines else next(source, None)) is not None:
        number += 1
        plain = line.rstrip("\r\n").split(separator)
        if '"' not in line:
            row = plain if plain != [""] else []
        else:
            quoted, taken = [line], _quoted(line, separator)
            while taken is None and len(quoted) < _MOST_LINES:
                more = lines.popleft() if lines else next(source, None)
                if more is None:
                    break
                quoted.append(more)
                taken = _quoted("".join(quoted), separator)
            swallowed = any(_is_row(other, separator, num_columns) for other in quoted[1:])
            if taken is None or swallowed or (num_columns and len(taken) != num_columns):
                lines.extendleft(reversed(quoted[1:]))
                row = plain if taken is None or len(quoted) > 1 else taken
            else:
                row, number = taken, number + len(quoted) - 1
        if row:
            num_columns = num_columns or len(row)
            yield number, row


def _quoted(text: str, separator: str) -> list[str] | None:
    """The one row of a text, in which quotes are closed where a field ends; None where it is none."""
    try:
        rows = list(csv.reader([text], delimiter=separator, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _is_row(line: str, separator: str, num_columns: int) -> bool:
    """Whether a line on its own has all columns, one of them a file's name."""
    fields = line.rstrip("\r\n").split(separator)
    return len(fields) == num_columns and any(_FILE.fullmatch(field.strip('" ')) for field in fields)


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
