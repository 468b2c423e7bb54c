"""Endless, exactly resumable batches: what all sources share, and the loader of sources in random access."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import LoaderSpec, StepBatch
from mmcore.data.sources.base import Records
from mmcore.ops import require

_ORDER, _SAMPLE = 0x04DE4, 0x5A3B1E
_MAX_TRIES = 1_000


@dataclass(frozen=True)
class Reader:
    """What a recipe makes of records; picklable, and both are pure functions.

    Args:
        sample: of a record and random numbers of its own, a sample; raises BrokenRecord.
        collate: of samples, a batch.
    """

    sample: Callable[[Any, np.random.Generator], Any]
    collate: Callable[[list[Any]], Any]


@dataclass
class Payload:
    """A micro-batch, as a loading process sends it."""

    batch: Any = None  # None where there is a failure
    ids: list[str] = field(default_factory=list)
    broken: Sequence[tuple[str, str]] = ()  # id and reason of each broken record met on the way
    cursor: list[int] | None = None  # where the stream stands after it (streams only)
    failure: str | None = None  # the sentence to stop with

    def pin_memory(self) -> "Payload":
        """What the DataLoader calls where there is a GPU: from pinned memory, copies to it run beside the host."""
        return replace(self, batch=map_tensors(Tensor.pin_memory, self.batch))


class Collector:
    """Collects the samples of a micro-batch, and the broken records between them, into one Payload."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.samples: list[Any] = []
        self.ids: list[str] = []
        self.broken: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, record: Any, rng: np.random.Generator) -> bool:
        """Takes the sample of a record, or counts it as broken; whether it was good."""
        try:
            self.samples.append(self.reader.sample(record, rng))
        except BrokenRecord as error:
            self.broken.append((record.id, error.reason))
            return False
        self.ids.append(record.id)
        return True

    def payload(self, cursor: list[int] | None = None) -> Payload:
        """The collected samples as a batch."""
        return Payload(self.reader.collate(self.samples), self.ids, self.broken, cursor)


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch with its tensors changed; of tuples, lists and dicts."""
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, batch)


def copied_ahead(payloads: Iterator[Payload], device: torch.device) -> Iterator[Payload]:
    """Micro-batches on a GPU, each copied there by a stream of its own while the one before is computed with."""
    stream = torch.cuda.Stream(device)

    def copied(payload: Payload) -> Payload:
        with torch.cuda.stream(stream):
            return replace(payload, batch=map_tensors(lambda x: x.to(device, non_blocking=True), payload.batch))

    def received(x: Tensor) -> Tensor:
        x.record_stream(torch.cuda.current_stream(device))  # its memory is not given away before it is read
        return x

    upcoming = copied(next(payloads))
    while upcoming.failure is None:
        torch.cuda.current_stream(device).wait_stream(stream)
        current = replace(upcoming, batch=map_tensors(received, upcoming.batch))
        upcoming = copied(next(payloads))
        yield current
    yield upcoming


class TrainLoader(ABC):
    """Endless iterator of full batches for one rank.

    After `load_state_dict(state)` the batches equal, bit for bit, those that followed `state_dict()` in the
    unbroken run.

    Args:
        spec: batch size, rank, seed and so on.
        steps_per_epoch: optimizer steps in an epoch, the same on all ranks.
        tally: counts broken records.
        num_streams: streams that give micro-batches in turn, each with a cursor; 0 if the step alone tells all.
    """

    device: torch.device | None = None
    """The GPU that batches are copied to ahead of time; None = they stay where they are."""

    def __init__(self, spec: LoaderSpec, steps_per_epoch: int, tally: BrokenTally, num_streams: int = 0) -> None:
        self.spec = spec
        self._cursors = [[0, 0] for _ in range(num_streams)]
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self._tally = tally
        self._payloads: Iterator[Payload] | None = None

    @property
    def broken(self) -> dict[str, int]:
        """Broken records met by this rank, and those found when the source was opened, by reason."""
        return dict(self._tally.before + self._tally.counts)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> StepBatch:
        """The next batch; raises ValueError where more than `max_broken` of the records are broken, or the tokenizer
        broke its contract."""
        if self._payloads is None:
            payloads = self._start(self.step * self.spec.accum)
            self._payloads = payloads if self.device is None else copied_ahead(payloads, self.device)
        parts, ids = [], []
        for part in range(self.spec.accum):
            payload = next(self._payloads)
            self._tally.add(len(payload.ids) + len(payload.broken), payload.broken)
            if payload.failure is not None:
                raise ValueError(payload.failure)
            if payload.cursor is not None:
                self._cursors[(self.step * self.spec.accum + part) % len(self._cursors)] = payload.cursor
            parts.append(payload.batch)
            ids += payload.ids
        epoch = self.step // self.steps_per_epoch
        self.step += 1
        self._tally.check(final=self.step % self.steps_per_epoch == 0)
        return StepBatch(tuple(parts), epoch, ids)

    def state_dict(self) -> dict:
        """Position after the latest batch, JSON-serialisable; of records in random access, one rank's serves all."""
        cursors = [list(cursor) for cursor in self._cursors]
        return {**self._identity(), "step": self.step, "cursors": cursors, "tally": self._tally.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch at which `state_dict()` was taken; raises ValueError where that was with other data,
        or other settings that choose the samples."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                hint = "; it is that of --workers" if name == "num_streams" else ""
                if name not in state:  # of a loader of another kind
                    hint = "; --shard-index must be given, or left out, as in that run"
                what = f"{name} must be that of the run to resume for the same batches to follow"
                raise ValueError(f"data: {what}, {state.get(name)!r}, got {value!r}{hint}")
        self.step = int(state["step"])
        self._tally.load_state_dict(state["tally"])
        self._cursors = [list(cursor) for cursor in state["cursors"]]
        self._payloads = None

    @abstractmethod
    def _start(self, first: int) -> Iterator[Payload]:
        """Micro-batches from the one of number `first` on, counted over all steps."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a state to fit."""


def start_workers(dataset: Dataset | IterableDataset, workers: int, sampler: Iterable[int] | None) -> Iterator[Payload]:
    """Payloads of `dataset` out of `workers` processes, in a fixed order."""
    # A generator of its own, or the DataLoader would draw from the model's random numbers.
    options = {"num_workers": workers, "generator": torch.Generator(), "pin_memory": torch.cuda.is_available()}
    return iter(DataLoader(dataset, batch_size=None, sampler=sampler, **options))


def num_workers(spec: LoaderSpec, most: int = 8) -> int:
    """Loading processes of a rank: as asked for; by default none without a GPU, where the step itself takes all cores,
    and else one for each core of the rank's share but one, at most `most`."""
    if spec.workers is not None:
        return spec.workers
    if not torch.cuda.is_available():
        return 0
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(share - 1, most))


def check_global_batch(spec: LoaderSpec, num_samples: int, what: str) -> None:
    """Raise a ValueError unless all ranks' batches fit into an epoch."""
    sizes = spec.batch_size, spec.world_size, what, spec.global_batch
    sentence = "the global batch (batch_size {} x {} ranks) must be at most {}, got {}"
    require("data", spec.global_batch <= num_samples, sentence, *sizes)


class MapBatches(Dataset):
    """One rank's micro-batches of records in random access, as a pure function of their number.

    Step g of an epoch is `order[g * GB : (g + 1) * GB]` of that epoch's order, whatever the number of ranks; a rank
    takes its slice. The place of a broken record is filled from the records of the epoch outside the step's own.
    """

    def __init__(self, records: Records, spec: LoaderSpec, reader: Reader) -> None:
        self.records, self.spec, self.reader = records, spec, reader
        self.num_samples = len(records)
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def __getitem__(self, number: int) -> Payload:
        """The micro-batch of this number, counted over all steps and epochs."""
        global_batch, size = self.spec.global_batch, self.spec.batch_size // self.spec.accum
        step, part = divmod(number, self.spec.accum)
        epoch, step_of_epoch = divmod(step, self.num_samples // global_batch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.spec.seed, _ORDER, epoch])
            self._epoch, self._order = epoch, self.records.order(rng, self.spec)
        start, batch = step_of_epoch * global_batch, Collector(self.reader)
        first = self.spec.rank * self.spec.batch_size + part * size
        tries = min(self.num_samples, _MAX_TRIES)
        for slot in range(first, first + size):
            if not self._fill(batch, start, slot, tries):
                sample_id, reason = batch.broken[-1]
                failure = f"data: {tries} records in a row are broken, the last is {sample_id}: {reason}"
                return Payload(ids=batch.ids, broken=batch.broken, failure=failure)
        return batch.payload()

    def _fill(self, batch: Collector, start: int, slot: int, tries: int) -> bool:
        """Add the record of `slot` in the step from `start` on, or the first good one of its substitutes."""
        n, global_batch = self.num_samples, self.spec.global_batch
        outside = n - global_batch
        for attempt in range(tries):
            position = slot
            if attempt > 0:
                turn = slot + (attempt - 1) * global_batch
                position = global_batch + turn % outside if outside else (slot + attempt) % n
            index = int(self._order[(start + position) % n])
            rng = np.random.default_rng([self.spec.seed, _SAMPLE, self._epoch, index])
            if batch.add(self.records.record(index), rng):
                return True
        return False


class MapLoader(TrainLoader):
    """Loader of records in random access: the batches depend on the global batch alone, not on ranks or workers; raises
    ValueError where the global batch is larger than the training set."""

    def __init__(self, records: Records, spec: LoaderSpec, reader: Reader, tally: BrokenTally) -> None:
        check_global_batch(spec, len(records), f"the {len(records)} training pairs")
        super().__init__(spec, len(records) // spec.global_batch, tally)
        self._batches = MapBatches(records, spec, reader)

    def _start(self, first: int) -> Iterator[Payload]:
        numbers, workers = count(first), num_workers(self.spec)
        return start_workers(self._batches, workers, numbers) if workers else map(self._batches.__getitem__, numbers)

    def _identity(self) -> dict[str, Any]:
        num_train = self._batches.num_samples
        return {"num_train": num_train, "global_batch": self.spec.global_batch, "seed": self.spec.seed}
