"""Endless, exactly resumable batches: what all sources share, and the loader of sources in random access."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import Batch, LoaderSpec
from mmcore.data.sources.base import PairSource, Tokenize, check_tokens
from mmcore.data.transforms.images import resize_center_crop, to_tensor

_ORDER, _SAMPLE = 0x04DE4, 0x5A3B1E
_MAX_TRIES = 1_000


class Stamped(Protocol):
    """What a batch of any kind has."""

    @property
    def epoch(self) -> int: ...
    @property
    def ids(self) -> list[str]: ...


B = TypeVar("B", bound=Stamped)


@dataclass
class Payload(Generic[B]):
    """What a loading process sends for one batch.

    Args:
        batch: a frozen dataclass, whose epoch the loader fills in.
        seen: records read for this batch, broken ones included.
        broken: (id, reason) of each broken record among them.
        cursor: where the stream stands after this batch (streams only).
        failure: the sentence to stop with, in place of a batch.
    """

    batch: B | None = None
    seen: int = 0
    broken: Sequence[tuple[str, str]] = ()
    cursor: list[int] | None = None
    failure: str | None = None


class PairAccumulator:
    """Collects pairs, and the broken records between them, into one Payload."""

    def __init__(self, tokenizer: Tokenize | None) -> None:
        self.tokenizer = tokenizer
        self.images: list[Tensor] = []
        self.captions: list[str] = []
        self.questions: list[str] = []
        self.labels: list[int] = []
        self.image_ids: list[int] = []
        self.ids: list[str] = []
        self.broken: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.images)

    def add(
        self,
        image: Tensor,
        caption: str,
        *,
        label: int,
        image_id: int,
        sample_id: str,
        question: str | None = None,
    ) -> None:
        """Take one good pair: image float32 [3, S, S]; all pairs have a question, or none has."""
        self.images.append(image)
        self.captions.append(caption)
        self.labels.append(label)
        self.image_ids.append(image_id)
        self.ids.append(sample_id)
        if question is not None:
            self.questions.append(question)

    def payload(self, cursor: list[int] | None = None) -> Payload[Batch]:
        """The collected pairs as tensors."""
        tokens = torch.zeros(len(self), 0, dtype=torch.int64)
        if self.tokenizer is not None:
            tokens = check_tokens(self.tokenizer(self.captions), len(self))
        batch = Batch(
            images=torch.stack(self.images),
            tokens=tokens,
            labels=torch.tensor(self.labels),
            epoch=-1,
            ids=self.ids,
            image_ids=torch.tensor(self.image_ids),
            captions=self.captions,
            questions=self.questions or None,
        )
        return Payload(batch, len(self) + len(self.broken), self.broken, cursor)


class TrainLoader(ABC, Generic[B]):
    """Endless iterator of full batches for one rank.

    After `load_state_dict(state)` the batches equal, bit for bit, those that followed `state_dict()` in the
    unbroken run.

    Args:
        spec: batch size, rank, seed and so on.
        steps_per_epoch: optimizer steps in an epoch, the same on all ranks.
        tally: counts broken records.
        num_streams: streams that give batches in turn, each with a cursor; 0 if the step alone tells all.
    """

    def __init__(
        self, spec: LoaderSpec, steps_per_epoch: int, tally: BrokenTally, num_streams: int = 0
    ) -> None:
        self.spec = spec
        self._cursors = [[0, 0] for _ in range(num_streams)]
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self._tally = tally
        self._payloads: Iterator[Payload[B]] | None = None

    @property
    def broken(self) -> dict[str, int]:
        """Broken records met by this rank, and those found when the source was opened, by reason."""
        return dict(self._tally.before + self._tally.counts)

    def __iter__(self) -> TrainLoader[B]:
        return self

    def __next__(self) -> B:
        """The next batch.

        Raises:
            ValueError: more than `max_broken` of the records are broken, or the tokenizer broke its contract.
        """
        if self._payloads is None:
            self._payloads = self._start()
        payload = next(self._payloads)
        self._tally.add(payload.seen, payload.broken)
        if payload.failure is not None:
            raise ValueError(payload.failure)
        epoch = self.step // self.steps_per_epoch
        if payload.cursor is not None:
            self._cursors[self.step % len(self._cursors)] = payload.cursor
        self.step += 1
        self._tally.check(final=self.step % self.steps_per_epoch == 0)
        assert payload.batch is not None
        return replace(payload.batch, epoch=epoch)  # pyright: ignore[reportArgumentType]

    def state_dict(self) -> dict:
        """Position after the latest batch, JSON-serialisable; whose it is, see `state_is_per_rank`."""
        cursors = [list(cursor) for cursor in self._cursors]
        return {**self._identity(), "step": self.step, "cursors": cursors, "tally": self._tally.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch at which `state_dict()` was taken.

        Raises:
            ValueError: the state was taken with other data, or other settings that choose the samples.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"data: {name} must be that of the run to resume for the same batches to follow, "
                    f"{state.get(name)!r}, got {value!r}"
                )
        self.step = int(state["step"])
        self._tally.load_state_dict(state["tally"])
        self._cursors = [list(cursor) for cursor in state["cursors"]]
        self._payloads = None

    state_is_per_rank: bool = False
    """True: each rank saves a state of its own. False: one rank's serves all, at any number of ranks."""

    @abstractmethod
    def _start(self) -> Iterator[Payload[B]]: ...

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a state to fit."""


def start_workers(
    dataset: Dataset | IterableDataset, workers: int, sampler: Sampler[int] | None
) -> Iterator[Payload]:
    """Payloads of `dataset` out of `workers` processes, in a fixed order."""
    # A generator of its own, or the DataLoader would draw from the model's random numbers.
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            generator=torch.Generator(),
        )
    )


class _Steps(Sampler[int]):
    """Step numbers without an end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        step = self.first
        while True:
            yield step
            step += 1


class Accumulator(Protocol[B]):
    """Collects samples, and the broken records between them, into one Payload."""

    broken: list[tuple[str, str]]

    def __len__(self) -> int: ...
    def payload(self) -> Payload[B]: ...


class MapBatches(Dataset, ABC, Generic[B]):
    """One rank's part of each step of a source in random access, as a pure function of the step.

    Step g of an epoch is `order[g * GB : (g + 1) * GB]` of that epoch's order, whatever the number of ranks; a rank
    takes its slice. The place of a broken sample is filled from the samples of the epoch outside the step's own.

    Args:
        num_samples: of the source.
        spec: how to read it.
    """

    def __init__(self, num_samples: int, spec: LoaderSpec) -> None:
        self.num_samples, self.spec = num_samples, spec
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    @abstractmethod
    def order(self, rng: np.random.Generator) -> np.ndarray:
        """An epoch's order of the samples, each once."""

    @abstractmethod
    def new(self) -> Accumulator[B]:
        """An empty batch."""

    @abstractmethod
    def add(self, batch: Any, index: int, rng: np.random.Generator) -> None:
        """Adds a sample to a batch of `new()`; raises BrokenRecord."""

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """Its name."""

    def __getitem__(self, step: int) -> Payload[B]:
        """The payload of `step`, counted over all epochs."""
        global_batch = self.spec.global_batch
        epoch, step_of_epoch = divmod(step, self.num_samples // global_batch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.spec.seed, _ORDER, epoch])
            self._epoch, self._order = epoch, self.order(rng)
        start, batch = step_of_epoch * global_batch, self.new()
        first = self.spec.rank * self.spec.batch_size
        for slot in range(first, first + self.spec.batch_size):
            if not self._fill(batch, start, slot):
                sample_id, reason = batch.broken[-1]
                return Payload(
                    seen=len(batch) + len(batch.broken),
                    broken=batch.broken,
                    failure=f"data: {self._tries} records in a row are broken, "
                    f"the last is {sample_id}: {reason}",
                )
        return batch.payload()

    @property
    def _tries(self) -> int:
        return min(self.num_samples, _MAX_TRIES)

    def _fill(self, batch: Accumulator[B], start: int, slot: int) -> bool:
        """Add the sample of `slot` in the step from `start` on, or the first good one of its substitutes."""
        n, global_batch = self.num_samples, self.spec.global_batch
        outside = n - global_batch
        for attempt in range(self._tries):
            position = slot
            if attempt > 0:
                turn = slot + (attempt - 1) * global_batch
                position = global_batch + turn % outside if outside else (slot + attempt) % n
            index = int(self._order[(start + position) % n])
            rng = np.random.default_rng([self.spec.seed, _SAMPLE, self._epoch, index])
            try:
                self.add(batch, index, rng)
                return True
            except BrokenRecord as error:
                batch.broken.append((self.sample_id(index), error.reason))
        return False


class PairBatches(MapBatches[Batch]):
    """Of image-caption pairs, in an order drawn anew in each epoch.

    Args:
        source: the pairs.
        spec: how to read them.
        tokenizer: captions to int64 [B, T], or None.
    """

    def __init__(self, source: PairSource, spec: LoaderSpec, tokenizer: Tokenize | None) -> None:
        super().__init__(len(source), spec)
        self.source, self.tokenizer = source, tokenizer

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A permutation."""
        return rng.permutation(self.num_samples)

    def new(self) -> PairAccumulator:
        """An empty batch."""
        return PairAccumulator(self.tokenizer)

    def sample_id(self, index: int) -> str:
        """The source's."""
        return self.source.sample_id(index)

    def add(self, batch: PairAccumulator, index: int, rng: np.random.Generator) -> None:
        """One pair, its image augmented where that is asked for."""
        source, size = self.source, self.spec.image_size
        caption = source.caption(index, rng)
        image = source.raw_image(index)
        view = source.augment(image, size, rng) if self.spec.augment else resize_center_crop(image, size)
        batch.add(
            to_tensor(view),
            caption,
            label=source.label(index, caption),
            image_id=source.image_id(index),
            sample_id=source.sample_id(index),
            question=source.question(index),
        )


class MapLoader(TrainLoader[B]):
    """Loader of a source in random access: the batches depend on the global batch alone, not on ranks or workers.

    Args:
        batches: of each step.
        tally: counts broken records.

    Raises:
        ValueError: the global batch is larger than the training set.
    """

    def __init__(self, batches: MapBatches[B], tally: BrokenTally) -> None:
        spec, num_train = batches.spec, batches.num_samples
        if spec.global_batch > num_train:
            raise ValueError(
                f"data: the global batch (batch_size {spec.batch_size} x {spec.world_size} ranks) must be "
                f"at most the {num_train} training pairs, got {spec.global_batch}"
            )
        super().__init__(spec, num_train // spec.global_batch, tally)
        self._batches = batches

    def _start(self) -> Iterator[Payload[B]]:
        steps = _Steps(self.step)
        if self.spec.workers == 0:
            return (self._batches[step] for step in steps)
        return start_workers(self._batches, self.spec.workers, steps)

    def _identity(self) -> dict[str, Any]:
        num_train, spec = self._batches.num_samples, self.spec
        return {"num_train": num_train, "global_batch": spec.global_batch, "seed": spec.seed}
