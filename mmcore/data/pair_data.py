"""What every source of pairs is opened as."""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from rich.console import Console
from rich.progress import track

from mmcore.data.broken import BrokenTally
from mmcore.data.config import LoaderSpec
from mmcore.data.loader import MapLoader, Reader, TrainLoader
from mmcore.data.sources.base import EvalSet, PairSource
from mmcore.data.sources.mixed import Drawn
from mmcore.data.sources.questions import QuestionSet
from mmcore.data.sources.shards import ShardLoader, ShardSource
from mmcore.ops import require


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
        val_name: what the held-out pairs are, for prints.
        drawn: an epoch is of `num_train` records of `source`, drawn with replacement.
        weights: of `drawn`, see `Drawn`.
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
    val_name: str = "held-out"
    drawn: bool = False
    weights: tuple[float, ...] | None = None

    def captions(self, most: int = 1_000_000, seed: int = 0) -> list[str]:
        """Training captions, every variant of each, which are read with a progress bar: all of them in a fixed order,
        or, of more than `most` samples, a random choice, of shards the first of a random order; always the same of a
        seed. Raises ValueError for a source of questions alone, or `most` below 1."""
        source, rng = self._captioned(), np.random.default_rng(seed)
        require("data", most >= 1, "--tokenizer-samples must be at least 1, got {}", most)
        if isinstance(source, ShardSource):
            total = source.num_samples
            shards = source.shards if total <= most else rng.permutation(source.shards).tolist()
            found = ([caption] for caption in islice(replace(source, shards=shards).captions(), most))
        else:
            total = len(source)
            index = range(total) if total <= most else np.sort(rng.choice(total, most, replace=False)).tolist()
            found = (source.all_captions(i) for i in index)
        console = Console(stderr=True)
        options = {"console": console, "transient": True, "disable": not console.is_terminal}
        return [caption for captions in track(found, "captions", min(most, total), **options) for caption in captions]

    def classes(self) -> list[int] | None:
        """The class of each training sample, an index into `class_names`; None where there are no classes."""
        return None if self.class_names is None else getattr(self.source, "classes", None)

    def train_loader(self, spec: LoaderSpec, reader: Reader) -> TrainLoader:
        """Endless batches for one rank of what `reader` (picklable if `spec.workers` > 0) makes of records; raises
        ValueError for a batch larger than the data, more streams than shards, or a source of questions alone."""
        source = self._captioned()
        if isinstance(source, ShardSource):
            return ShardLoader(source, spec, reader, self._tally())
        records = Drawn(source, self.num_train, self.weights) if self.drawn else source
        return MapLoader(records, spec, reader, self._tally())

    def question_loader(self, spec: LoaderSpec, reader: Reader) -> TrainLoader:
        """As `train_loader`, of questions: the caption of a record is an answer to its question, drawn anew in each
        epoch, as likely as the share of the annotators who gave it."""
        if self.questions is None:
            raise ValueError(f"data: {self.name!r} must have questions to train on, but has captions alone")
        return MapLoader(self.questions, spec, reader, self._tally())

    def image_loader(self, spec: LoaderSpec, reader: Reader) -> TrainLoader:
        """Endless batches of images for one rank, those of the questions where there are no captions; an epoch has an
        image as often as it has captions or questions.

        Args:
            spec, reader: as for `train_loader`.

        Raises:
            ValueError: a batch larger than their number, or more streams than shards.
        """
        return self.question_loader(spec, reader) if self.source is None else self.train_loader(spec, reader)

    def held_out_images(self) -> EvalSet | None:
        """Each held-out image once: with its captions, or without where there are questions alone."""
        asked = self.val_questions
        if self.val is not None or asked is None:
            return self.val
        indices = list({asked.image_id(i): i for i in range(len(asked))}.values())
        return EvalSet(asked, indices, [[] for _ in indices], max_broken=asked.max_broken)

    def _captioned(self) -> PairSource | ShardSource:
        if self.source is None:
            raise ValueError(f"data: {self.name!r} must have captions to train on, but has questions alone")
        return self.source

    def _tally(self) -> BrokenTally:
        return BrokenTally(self.max_broken, f"{self.name!r}", self.broken)
