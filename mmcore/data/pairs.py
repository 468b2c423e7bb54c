"""`open_data`: from a `DataConfig` to training pairs and held-out pairs."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmcore.data.broken import BrokenTally
from mmcore.data.config import DataConfig, LoaderSpec, SourceKind
from mmcore.data.digits import DIGIT_NAMES, DIGIT_TEMPLATES, open_digits
from mmcore.data.loader import MapLoader, TrainLoader
from mmcore.data.shards import ShardSource, open_shards
from mmcore.data.sources import EvalSet, PairSource, Tokenize
from mmcore.data.stamps import open_stamps
from mmcore.data.table import open_table

_BUILT_IN = ("digits", "stamps")
_TABLE_SUFFIXES = (".csv", ".tsv")


@dataclass(frozen=True)
class PairData:
    """Image-caption pairs to train on, and those held out.

    Args:
        name: what was asked for as `DataConfig.data`.
        num_train: training pairs.
        source: the training pairs, in random access or as shards.
        val: the held-out pairs, or None.
        max_broken: share of broken records above which a loader raises.
        class_names: names of the classes for zero-shot classification, or None.
        templates: captions with '{}' in place of the class name, or None.
        broken: broken records found on opening, by reason.
    """

    name: str
    num_train: int
    source: PairSource | ShardSource
    val: EvalSet | None
    max_broken: float
    class_names: list[str] | None = None
    templates: list[str] | None = None
    broken: Counter[str] = field(default_factory=Counter)

    def captions(self) -> Iterator[str]:
        """Training captions, every variant of each, in a fixed order: what a tokenizer is trained on."""
        if isinstance(self.source, ShardSource):
            return self.source.captions()
        source = self.source
        return (caption for i in range(len(source)) for caption in source.all_captions(i))

    def train_loader(self, spec: LoaderSpec, tokenizer: Tokenize) -> TrainLoader:
        """Endless batches for one rank.

        Args:
            spec: batch size, rank, seed and so on.
            tokenizer: called with list[str], returns int64 [B, T]; picklable if `spec.workers` > 0.

        Raises:
            ValueError: a batch larger than the data, or more streams than shards.
        """
        tally = BrokenTally(self.max_broken, f"{self.name!r}", self.broken)
        if isinstance(self.source, ShardSource):
            return self.source.loader(spec, tokenizer, tally)
        return MapLoader(self.source, spec, tokenizer, tally)


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
    class_names, templates, broken = None, None, Counter()
    if kind == "digits":
        source, val = open_digits(config.val_fraction, seed)
        class_names, templates = DIGIT_NAMES, DIGIT_TEMPLATES
    elif kind == "stamps":
        stamps = open_stamps(config, seed)
        source, val, class_names, templates = stamps.train, stamps.val, stamps.class_names, stamps.templates
    elif kind == "csv":
        source, val, broken = open_table(config, seed)
    else:
        source, val = open_shards(config)
    num_train = source.num_samples if isinstance(source, ShardSource) else len(source)
    if num_train < 2:
        raise ValueError(f"data: {config.data!r} must have at least 2 training pairs, got {num_train}")
    return PairData(config.data, num_train, source, val, config.max_broken, class_names, templates, broken)


def source_kind(data: str) -> SourceKind:
    """Which kind of source `data` names.

    Raises:
        ValueError: none, with the nearest built-in name where there is one.
    """
    if data == "digits" or data == "stamps":
        return data
    if ".tar" in data or ".tgz" in data or data.startswith("pipe:"):
        return "shards"
    if data.lower().endswith(_TABLE_SUFFIXES):
        return "csv"
    near = difflib.get_close_matches(data.lower(), _BUILT_IN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        "data: data must be 'digits', 'stamps', tar shards such as 'shards/{000..009}.tar', "
        f"or a .csv or .tsv file, got {data!r}{hint}"
    )
