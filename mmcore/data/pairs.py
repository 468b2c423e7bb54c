"""`open_data`: from a `DataConfig` to training pairs and held-out pairs."""

from __future__ import annotations

import difflib
from dataclasses import replace

from mmcore.data.config import BUILT_IN, DataConfig, SourceKind
from mmcore.data.pair_data import PairData
from mmcore.data.sources.annotations import open_json
from mmcore.data.sources.digits import DIGIT_NAMES, DIGIT_TEMPLATES, digit_captions, digit_questions, open_digits
from mmcore.data.sources.emoji import open_emoji
from mmcore.data.sources.shards import open_shards
from mmcore.data.sources.stamps import open_stamps
from mmcore.data.sources.table import open_table

_TABLE_SUFFIXES = (".csv", ".tsv")


def open_data(config: DataConfig, *, seed: int) -> PairData:
    """Find the pairs that `config` names, check them, and split off the held-out ones.

    Args:
        config: which pairs.
        seed: seed of the split, at least 0.

    Raises:
        ValueError: one sentence for each thing that can be wrong with the input.
    """
    kind = source_kind(config.data)
    config.check(kind)
    if seed < 0:
        raise ValueError(f"data: seed must be at least 0, got {seed}")
    data = _open(kind, config, seed)
    if data.num_train < 2:
        raise ValueError(f"data: {config.data!r} must have at least 2 training pairs, got {data.num_train}")
    return data


def _open(kind: SourceKind, config: DataConfig, seed: int) -> PairData:
    name, limit = config.data, config.max_broken
    if kind == "stamps":
        return open_stamps(config, seed)
    if kind == "emoji":
        return open_emoji(config)
    if kind == "json":
        return open_json(config, seed)
    if kind == "csv":
        pairs, val, broken = open_table(config, seed)
        return PairData(name, len(pairs), pairs, val, limit, broken=broken)
    if kind == "shards":
        shards, val = open_shards(config)
        return PairData(name, shards.num_samples, shards, val, limit)
    train, held_out = open_digits(config.val_fraction, seed)
    data = PairData(
        name, len(train), train, None, limit, DIGIT_NAMES, DIGIT_TEMPLATES, questions=digit_questions(train)
    )
    if held_out is None:
        return data
    return replace(data, val=digit_captions(held_out), val_questions=digit_questions(held_out))


def source_kind(data: str) -> SourceKind:
    """Which kind of source `data` names.

    Raises:
        ValueError: none, with the nearest built-in name where there is one.
    """
    if data == "digits" or data == "stamps" or data == "emoji":
        return data
    if ".tar" in data or ".tgz" in data or data.startswith("pipe:"):
        return "shards"
    if data.lower().endswith(_TABLE_SUFFIXES):
        return "csv"
    if data.lower().endswith(".json"):
        return "json"
    near = difflib.get_close_matches(data.lower(), BUILT_IN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        "data: data must be 'digits', 'stamps', 'emoji', tar shards such as 'shards/{000..009}.tar', "
        f"or a .csv, .tsv or .json file, got {data!r}{hint}"
    )
