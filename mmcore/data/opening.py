"""From a `DataConfig` to what is trained on and what is held out, as pairs or as conversations."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcore.data.config import BUILT_IN, FRACTIONS, DataConfig, SourceKind
from mmcore.data.pair_data import PairData
from mmcore.data.sources import derived_chats
from mmcore.data.sources.annotations import open_json
from mmcore.data.sources.answers import Answers
from mmcore.data.sources.base import OtherPictures, PairSource
from mmcore.data.sources.classes import ClassFolder, open_classes
from mmcore.data.sources.columns import is_hf, is_parquet, open_hf, open_parquet
from mmcore.data.sources.conversations import ConversationSet, open_conversations
from mmcore.data.sources.digits import (
    DIGIT_NAMES,
    DIGIT_TEMPLATES,
    Digits,
    digit_captions,
    digit_questions,
    open_digits,
)
from mmcore.data.sources.emoji import Emoji, open_emoji
from mmcore.data.sources.files import FilePairs, check_disjoint
from mmcore.data.sources.keyed import KeyedPairs, file_paths, read_files, split_keyed
from mmcore.data.sources.mixed import SEPARATOR, Mixed, parse_weights
from mmcore.data.sources.scattered import open_scattered
from mmcore.data.sources.shard_index import IndexedPairs, open_index
from mmcore.data.sources.shards import check_other_shards, keys_of_shards, open_held_out_shards, open_shards
from mmcore.data.sources.split import split_linked
from mmcore.data.sources.stamps import Stamps, open_stamps
from mmcore.data.sources.table import open_table
from mmcore.data.sources.tar import expand_shards
from mmcore.errors import did_you_mean
from mmcore.ops import require

_TABLES, _CHATS = (".csv", ".tsv"), (".jsonl", ".yaml", ".yml")
_WHOLE = FilePairs | Answers | Emoji | ClassFolder | KeyedPairs
"""Sources of which everything can be held out."""
_HEAD = 1 << 16
"""Characters of a JSON file that tell whether its first record is a conversation."""


@dataclass(frozen=True)
class ChatData:
    """Conversations to train on, and those held out, or None."""

    name: str
    train: ConversationSet
    val: ConversationSet | None

    @property
    def num_train(self) -> int:
        return len(self.train)


def source_kind(data: str) -> SourceKind:
    """Which kind of source `data` names; raises ValueError for none, with the nearest built-in name."""
    name = data.lower()
    if data in BUILT_IN:
        return data  # pyright: ignore[reportReturnType]
    if data and is_parquet(data):
        return "parquet"
    if ".tar" in data or ".tgz" in data or data.startswith("pipe:"):
        return "shards"
    if name.endswith(_TABLES):
        return "csv"
    if name.endswith(_CHATS):
        return "chats"
    if name.endswith(".json"):
        return "chats" if _holds_conversations(Path(data).expanduser()) else "json"
    if data and Path(data).expanduser().is_dir():
        return "hf" if is_hf(data) else "classes"
    known = "'digits', 'scattered', 'stamps', 'emoji', tar shards such as 'shards/{000..009}.tar'"
    files = "a .csv, .tsv, .json, .jsonl, .parquet or .yaml file, or a folder of classes"
    raise ValueError(f"data: data must be {known}, or {files}, got {data!r}{did_you_mean(name, BUILT_IN)}")


def _kind(config: DataConfig) -> SourceKind:
    """Of a source, by its name and by whether keys of its records are given."""
    kind: SourceKind = source_kind(config.data)
    is_keyed = (config.image_key, config.caption_keys) != (None, None)
    has_records = kind in ("csv", "json") or config.data.lower().endswith(".jsonl")
    return "records" if is_keyed and has_records else kind


def _holds_conversations(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open(encoding="utf-8-sig", errors="replace") as opened:
        return '"conversations"' in opened.read(_HEAD)


def open_data(config: DataConfig, *, seed: int) -> PairData:
    """Finds the pairs that `config` names, checks them, and splits off the held-out ones by `seed`, at least 0. Of
    conversations about one image, the first answer is the caption.

    Raises:
        ValueError: one sentence for each thing that can be wrong with the input.
    """
    require("data", seed >= 0, "seed must be at least 0, got {}", seed)
    parts = _parts(config)
    if len(parts) == 1:
        config.check(_kind(config))
        data = _one(config, seed)
    else:
        data = _mixed(config, parts, seed)
    if config.with_replacement:
        is_random = isinstance(data.source, PairSource)
        what = "with_replacement must be of captions in random access (of shards, with shard_index), got {!r}"
        require("data", is_random, what, config.data)
        weights = parse_weights(config.data_weights, len(parts))
        data = replace(data, num_train=config.num_samples or data.num_train, drawn=True, weights=weights)
    if config.shuffle_pictures or config.wrong_captions:
        name = "shuffle_pictures" if config.shuffle_pictures else "wrong_captions"
        what = "{} must be of captions in random access, got {!r}"
        require("data", isinstance(data.source, PairSource), what, name, config.data)
        both = config.shuffle_pictures and config.wrong_captions
        require("data", not both, "wrong_captions must be 0 with shuffle_pictures, got {}", config.wrong_captions)
        assert isinstance(data.source, PairSource)
        order = np.random.default_rng([seed, 0x07E4]).permutation(len(data.source))
        others, by = np.arange(len(order)), 1
        if not config.shuffle_pictures:
            order, classes = order[: round(config.wrong_captions * len(order))], data.classes()
            if classes is not None and len(order):  # one class after the other, and on by the largest
                of = np.array(classes)[order]
                order, by = order[np.argsort(of, kind="stable")], int(np.bincount(of).max())
        others[order] = np.roll(order, by)  # circles through all of them: none has its own
        data = replace(data, source=OtherPictures(data.source, others.tolist()))
    what = "{!r} must have at least 2 training pairs, got {}"
    require("data", data.num_train >= 2, what, config.data, data.num_train)
    return data


def _parts(config: DataConfig) -> list[DataConfig]:
    """The sources of `config.data`. Shards alone, a.tar::b.tar, are one, unless they have weights; those that stand
    apart have an index each."""
    parts = [replace(config, data=part.strip()) for part in config.data.split(SEPARATOR)]
    shards = [place for place, part in enumerate(parts) if len(parts) > 1 and _kind(part) == "shards"]
    if len(shards) == len(parts) and config.data_weights is None:
        return [config]
    if config.shard_index is not None and len(shards) > 1:
        for number, place in enumerate(shards):
            parts[place] = replace(parts[place], shard_index=config.shard_index / str(number))
    return parts


def _one(config: DataConfig, seed: int) -> PairData:
    kind = _kind(config)
    return _pairs_of(_chats(config, seed)) if kind == "chats" else _pairs(kind, config, seed)


def _mixed(config: DataConfig, parts: list[DataConfig], seed: int) -> PairData:
    """Several sources of captions as one, all of each; what is held out is `config.val_data`."""
    kinds: list[SourceKind] = [_kind(part) for part in parts]
    config.check(*kinds)
    what = "val_fraction={} has no effect on a mix of sources: give --val-data"
    require("data", config.val_fraction in (0, *FRACTIONS), what, config.val_fraction)
    opened = [
        _one(replace(part.applies(kind), val_data=None, val_fraction=0.0), seed)
        for part, kind in zip(parts, kinds, strict=True)
    ]
    sources: list[PairSource] = []
    for part, data in zip(parts, opened, strict=True):
        what = "{!r} must hold captions in random access to stand in a mix (shards with --shard-index), got {}"
        got = "questions alone" if data.source is None else "a stream"
        require("data", isinstance(data.source, PairSource), what, part.data, got)
        assert isinstance(data.source, PairSource)
        sources.append(data.source)
    source, val = Mixed(sources), None
    if config.val_data is not None:
        what = "val_data must not be among the sources of data, got {!r}"
        require("data", config.val_data not in [part.data for part in parts], what, config.val_data)
        held_out = replace(config, data=config.val_data)
        val = open_held_out(replace(held_out.applies(_kind(held_out)), val_data=None, shard_index=None)).val
        require("data", val is not None, "val_data must hold captions, got {!r}", config.val_data)
    broken = sum((data.broken for data in opened), Counter[str]())
    return PairData(config.data, len(source), source, val, config.max_broken, broken=broken)


def open_chats(config: DataConfig, *, seed: int, captions_only: bool = False) -> ChatData:
    """The conversations that `config` names, split by their images; of pairs, each caption is the answer to what the
    image shows, and each answer that to its question; raises ValueError as `open_data`.

    Args:
        config: which.
        seed: of the split, of what a mix draws, and of what is asked in derived ones.
        captions_only: derived ones ask nothing but what is shown, as stage 1 of LLaVA has it.
    """
    kind = _checked(config, seed)
    for name in ("with_replacement", "shuffle_pictures", "wrong_captions"):
        value = getattr(config, name)
        require("data", not value, "{}={} has no effect on conversations, leave it out", name, value)
    if kind == "chats":
        data = _chats(config, seed)
    elif kind in BUILT_IN:
        data = _derived(config, seed, captions_only)
    else:
        data = _chats_of(_pairs(kind, config, seed), config)
    require("data", data.num_train >= 2, "{!r} must have at least 2 conversations, got {}", config.data, data.num_train)
    return data


def open_held_out(config: DataConfig) -> PairData:
    """The pairs or questions that `config.data` names, none of them split off; of 'emoji' the combinations that every
    run holds out or, of a style that draws no combinations, every drawing. Raises ValueError as `open_data`, and for
    'digits' or 'stamps', which a run splits itself."""
    kind = _kind(config)
    if kind in ("digits", "scattered", "stamps"):
        raise ValueError(f"--data must be a file or shards, of which all is held out, or emoji, got {config.data!r}")
    if kind == "shards":
        val = open_held_out_shards(config)
        return PairData(config.data, len(val), None, val, config.max_broken)
    data = open_data(config if kind == "emoji" else replace(config, val_fraction=0.0), seed=0)
    if data.val is not None:
        return data
    if data.source is None:  # a file may tell itself what is to test
        return data if data.val_questions is not None else replace(data, val_questions=data.questions)
    assert isinstance(data.source, _WHOLE)
    return replace(data, val=data.source.held_out(config.max_broken))


def _checked(config: DataConfig, seed: int) -> SourceKind:
    what = "data must be one source of conversations, got {!r}; a mix of them is a YAML file"
    require("data", SEPARATOR not in config.data, what, config.data)
    kind = _kind(config)
    config.check(kind)
    require("data", seed >= 0, "seed must be at least 0, got {}", seed)
    return kind


def _pairs(kind: SourceKind, config: DataConfig, seed: int) -> PairData:
    name, limit = config.data, config.max_broken
    if kind == "stamps":
        return open_stamps(config, seed)
    if kind == "emoji":
        return open_emoji(config)
    if kind == "json":
        return open_json(config, seed)
    if kind == "classes":
        return open_classes(config, seed)
    if kind == "csv":
        pairs, val, broken = open_table(config, seed)
        return PairData(name, len(pairs), pairs, val, limit, broken=broken)
    if kind in ("records", "parquet", "hf"):
        return _keyed(kind, config, seed)
    if kind == "shards" and config.shard_index is not None:
        return _indexed(config)
    if kind == "shards":
        shards, val = open_shards(config)
        return PairData(name, shards.num_samples, shards, val, limit)
    if kind == "scattered":
        train, held_out = open_scattered(config.val_fraction, seed, inverted=config.inverted)
    else:
        train, held_out = open_digits(config.val_fraction, seed)
    data = PairData(name, len(train), train, None, limit, DIGIT_NAMES, DIGIT_TEMPLATES)
    data = replace(data, questions=digit_questions(train))
    if held_out is None:
        return data
    return replace(data, val=digit_captions(held_out), val_questions=digit_questions(held_out))


def _keyed(kind: SourceKind, config: DataConfig, seed: int) -> PairData:
    def opened(data: str, argument: str) -> tuple[KeyedPairs, Counter[str]]:
        if kind == "records":
            pairs, tally = read_files(config, data, argument)
            return pairs, tally.counts
        return (open_parquet if kind == "parquet" else open_hf)(config, data, argument), Counter()

    pairs, broken = opened(config.data, "data")
    if config.val_data is None:
        train, held_out = split_keyed(pairs, config, seed)
    else:
        train, (held_out, broken_val) = pairs, opened(config.val_data, "val_data")
        broken += broken_val
        what = "val_data must not be the training data, got {!r}"
        is_other = os.path.realpath(config.val_data) != os.path.realpath(config.data)
        require("data", is_other, what, config.val_data)
        check_disjoint(file_paths(pairs), file_paths(held_out))
    val = None if held_out is None else held_out.held_out(config.max_broken)
    return PairData(config.data, len(train), train, val, config.max_broken, broken=broken)


def _indexed(config: DataConfig) -> PairData:
    """Shards in random access."""
    assert config.shard_index is not None
    shards, keys = expand_shards(config.data, "data"), keys_of_shards(config)
    source, val = IndexedPairs(open_index(config.shard_index, shards), keys), None
    if config.val_data is not None:
        check_other_shards(shards, expand_shards(config.val_data, "val_data"))
        val = open_held_out_shards(replace(config, data=config.val_data))
    return PairData(config.data, len(source), source, val, config.max_broken)


def _chats(config: DataConfig, seed: int) -> ChatData:
    options: Any = {"image_root": config.image_root, "max_broken": config.max_broken, "seed": seed}
    train, val = open_conversations(config.data, **options), None
    if config.val_data is not None:
        val = open_conversations(config.val_data, **options)
    elif config.val_fraction > 0:  # by images: conversations about one are on one side
        sides = split_linked([c.images for c in train.conversations], config.val_fraction, seed)
        train, val = (train.take(side) for side in sides)
    return ChatData(train.name, train, val)


def _derived(config: DataConfig, seed: int, captions_only: bool) -> ChatData:
    data = _pairs(source_kind(config.data), config, seed)
    options: Any = {"seed": seed, "captions_only": captions_only}
    sides: list[ConversationSet | None] = []
    held_out = data.val and data.val.source
    for source, questions, is_held_out in ((data.source, data.questions, False), (held_out, data.val_questions, True)):
        if source is None:
            sides.append(None)
        elif isinstance(source, Digits):
            sides.append(derived_chats.digit_conversations(source, **options))
        elif config.data == "emoji":
            sides.append(derived_chats.emoji_conversations(source, questions, **options))
        else:
            assert isinstance(source, Stamps)
            of_stamps: Any = {"language": config.language, "max_broken": config.max_broken, "is_held_out": is_held_out}
            sides.append(derived_chats.stamp_conversations(source, questions, **options, **of_stamps))
    train, val = sides
    assert train is not None
    return ChatData(train.name, train, val)


def _chats_of(data: PairData, config: DataConfig) -> ChatData:
    source = data.source
    chats_of: Callable[[Any], ConversationSet] = derived_chats.described_conversations
    if source is None:
        sides: list[Any] = [data.questions, data.val_questions]
        chats_of = derived_chats.asked_conversations
    elif isinstance(source, FilePairs | ClassFolder | KeyedPairs):
        sides = [source.held_out(config.max_broken), data.val]
    else:  # conversations are read in an order by their lengths, which a stream has not
        sides = [open_held_out_shards(config), data.val]
    train, val = (None if side is None else chats_of(side) for side in sides)
    assert train is not None
    return ChatData(data.name, replace(train, name=data.name, broken=data.broken), val)


def _pairs_of(chats: ChatData) -> PairData:
    source = Answers.of(chats.train)
    val = None if chats.val is None else Answers.of(chats.val).held_out(chats.val.max_broken)
    left_out = Counter({"not of one image": len(chats.train) - len(source)})
    broken = chats.train.broken + left_out
    return PairData(chats.name, len(source), source, val, chats.train.max_broken, broken=broken)
