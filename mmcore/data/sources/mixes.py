"""Mixes of instruction data: a YAML file names JSON files and how much to take of each, as LLaVA-NeXT writes it."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import yaml

from mmcore.ops import require

Strategy = Literal["all", "first", "end", "random"]

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(%?)")
_KEYS = ("json_path", "sampling_strategy")


@dataclass(frozen=True)
class Sampling:
    """Which records of a file to take."""

    strategy: Strategy  # all of them, the first, the last, or some drawn without replacement
    amount: float = 100  # how many, at least 1, or percent of them, above 0 and at most 100; no effect on 'all'
    is_percent: bool = True  # which of the two; a share is rounded up

    def indices(self, num_records: int, rng: np.random.Generator) -> list[int]:
        """The records to take, in the file's order; all where fewer are there than asked for."""
        num_taken = math.ceil(self.amount * num_records / 100) if self.is_percent else int(self.amount)
        if self.strategy == "random":
            return sorted(rng.permutation(num_records)[:num_taken].tolist())
        taken = slice(-num_taken, None) if self.strategy == "end" else slice(num_taken)
        return list(range(num_records)[taken])


def parse_sampling(text: str) -> Sampling:
    """A sampling strategy as LLaVA-NeXT writes it: 'all', 'first:10%', 'end:500', 'random:20%'; raises ValueError,
    naming what is wrong with it."""
    strategies = get_args(Strategy)
    wanted, _, amount = text.partition(":")
    what = "sampling_strategy must be one of {}, got {!r}"
    require("data", wanted in strategies, what, ", ".join(strategies), text)
    name = cast(Strategy, wanted)
    if name == "all":
        require("data", not amount, "sampling_strategy 'all' takes no amount, got {!r}", text)
        return Sampling("all")
    found = _AMOUNT.fullmatch(amount)
    value, is_percent = (float(found[1]), bool(found[2])) if found else (0.0, False)
    holds = 0 < value <= 100 if is_percent else value >= 1 and value.is_integer()
    what = "sampling_strategy must be such as '{0}:500' or '{0}:10%', at least 1 record and at most 100%, got {1!r}"
    require("data", holds, what, name, text)
    return Sampling(name, value, is_percent)


def read_mix(path: str) -> list[tuple[Path, Sampling]]:
    """The JSON files of a mix in YAML, and which of their records to take; raises ValueError, naming the entry.

    `datasets: [{json_path: x.json, sampling_strategy: "first:10%"}]`: a json_path is relative to the mix's folder, and
    without a sampling_strategy, all is taken.
    """
    file = Path(path)
    require("data", file.is_file(), "data must be an existing file, got {!r}", path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"data: {path!r} must be YAML in UTF-8, got: {' '.join(str(error).split())}") from None
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"data: {path!r} must hold a list 'datasets' with at least one entry, got {content!r:.80}")
    return [_part(entry, f"{path!r}, datasets[{n}]", file.parent) for n, entry in enumerate(entries)]


def _part(entry: Any, where: str, folder: Path) -> tuple[Path, Sampling]:
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
        raise ValueError(f"data: {where} must have a json_path, got {entry!r:.80}")
    for key in entry:
        require("data", key in _KEYS, "{} must hold {} alone, got {!r}", where, " and ".join(_KEYS), key)
    try:
        sampling = parse_sampling(str(entry.get("sampling_strategy", "all")))
    except ValueError as error:
        raise ValueError(f"{error} in {where}") from None
    return folder / Path(entry["json_path"]).expanduser(), sampling
