"""`open_data`: from a `DataConfig` to training pairs and held-out pairs."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mmcore.data.broken import BrokenTally
from mmcore.data.config import Batch, DataConfig, LoaderSpec, SourceKind
from mmcore.data.loader import MapLoader, PairBatches, TrainLoader
from mmcore.data.sources.annotations import open_json
from mmcore.data.sources.base import EvalSet, PairSource, Tokenize
from mmcore.data.sources.digits import (
    DIGIT_NAMES,
    DIGIT_TEMPLATES,
    digit_captions,
    digit_questions,
    open_digits,
)
from mmcore.data.sources.questions import QuestionSet
from mmcore.data.sources.shards import ShardSource, open_shards
from mmcore.data.sources.stamps import open_stamps
from mmcore.data.sources.table import open_table

_BUILT_IN = ("digits", "stamps")
_TABLE_SUFFIXES = (".csv", ".tsv")


@dataclass(frozen=True)
class PairData:
    """Image-caption pairs to train on, and those held out.

    Args:
        name: what was asked for as `DataConfig.data`.
        num_train: training pairs; of a source without captions, training questions.
        source: the training pairs, in random access or as shards; None where there are questions alone.
        val: the held-out pairs, or None.
        max_broken: share of broken records above which a loader raises.
        class_names: names of the classes for zero-shot classification, or None.
        templates: captions with '{}' in place of the class name, or None.
        broken: broken records found on opening, by reason.
        questions: questions about training images, or None; derived ones of the built-in sources say so.
        val_questions: questions about held-out images, or None.
    """

    name: str
    num_train: int
    source: PairSource | ShardSource | None
    val: EvalSet | None
    max_broken: float
    class_names: list[str] | None = None
    templates: list[str] | None = None
    broken: Counter[str] = field(default_factory=Counter)
    questions: QuestionSet | None = None
    val_questions: QuestionSet | None = None

    def captions(self) -> Iterator[str]:
        """Training captions, every variant of each, in a fixed order: what a tokenizer is trained on.

        Raises:
            ValueError: the source has questions alone.
        """
        source = self._captioned()
        if isinstance(source, ShardSource):
            return source.captions()
        return (caption for i in range(len(source)) for caption in source.all_captions(i))

    def train_loader(self, spec: LoaderSpec, tokenizer: Tokenize | None) -> TrainLoader[Batch]:
        """Endless batches for one rank.

        Args:
            spec: batch size, rank, seed and so on.
            tokenizer: called with list[str], returns int64 [B, T]; picklable if `spec.workers` > 0. None leaves
                the captions as text.

        Raises:
            ValueError: a batch larger than the data, more streams than shards, or a source of questions alone.
        """
        source = self._captioned()
        if isinstance(source, ShardSource):
            return source.loader(spec, tokenizer, self._tally())
        return MapLoader(PairBatches(source, spec, tokenizer), self._tally())

    def question_loader(self, spec: LoaderSpec, tokenizer: Tokenize | None) -> TrainLoader[Batch]:
        """Endless batches of questions for one rank; the `captions` of a batch are answers to its `questions`.

        An answer is drawn anew in each epoch, as likely as the share of the annotators who gave it.

        Args:
            spec: batch size, rank, seed and so on.
            tokenizer: as for `train_loader`; called with the answers.

        Raises:
            ValueError: a source without questions, or a batch larger than their number.
        """
        if self.questions is None:
            raise ValueError(f"data: {self.name!r} must have questions to train on, but has captions alone")
        return MapLoader(PairBatches(self.questions, spec, tokenizer), self._tally())

    def _captioned(self) -> PairSource | ShardSource:
        if self.source is None:
            raise ValueError(f"data: {self.name!r} must have captions to train on, but has questions alone")
        return self.source

    def _tally(self) -> BrokenTally:
        return BrokenTally(self.max_broken, f"{self.name!r}", self.broken)


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
    if kind == "digits":
        train, held_out = open_digits(config.val_fraction, seed)
        val = None if held_out is None else digit_captions(held_out)
        data = PairData(name, len(train), train, val, limit, DIGIT_NAMES, DIGIT_TEMPLATES)
        val_questions = None if held_out is None else digit_questions(held_out)
        return replace(data, questions=digit_questions(train), val_questions=val_questions)
    if kind == "stamps":
        stamps = open_stamps(config, seed)
        data = PairData(
            name, len(stamps.train), stamps.train, stamps.val, limit, stamps.class_names, stamps.templates
        )
        return replace(data, questions=stamps.questions, val_questions=stamps.val_questions)
    if kind == "csv":
        pairs, val, broken = open_table(config, seed)
        return PairData(name, len(pairs), pairs, val, limit, broken=broken)
    if kind == "shards":
        shards, val = open_shards(config)
        return PairData(name, shards.num_samples, shards, val, limit)
    texts = open_json(config, seed)
    num_train = len(texts.captions or texts.questions or ())
    data = PairData(name, num_train, texts.captions, texts.val, limit, broken=texts.broken)
    return replace(data, questions=texts.questions, val_questions=texts.val_questions)


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
    if data.lower().endswith(".json"):
        return "json"
    near = difflib.get_close_matches(data.lower(), _BUILT_IN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        "data: data must be 'digits', 'stamps', tar shards such as 'shards/{000..009}.tar', "
        f"or a .csv, .tsv or .json file, got {data!r}{hint}"
    )
