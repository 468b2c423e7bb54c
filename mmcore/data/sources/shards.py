"""Training and held-out pairs in webdataset tar shards, read as streams."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig, LoaderSpec
from mmcore.data.loader import Collector, Payload, Reader, TrainLoader, num_workers, start_workers
from mmcore.data.sources.base import EvalSet, by_image, stable_hash
from mmcore.data.sources.tar import (
    METADATA_SUFFIX,
    IndexedPair,
    Sample,
    decode_caption,
    expand_shards,
    image_identity,
    index_shard,
    is_remote,
    pair_bytes,
    read_range,
    sample_id,
    shard_samples,
)
from mmcore.data.transforms.images import Preprocess, decode_rgb, training_view

SHUFFLE_BUFFER = 1_000
"""Undecoded samples among which the next one of a stream is drawn."""
_SHARDS, _SAMPLE = 0x54A4D5, 0x5A3B1F


@dataclass
class ShardRecord:
    """A sample of a shard as a record, see `mmcore.data.sources.base.Pair`."""

    raw: Sample
    question = None

    @property
    def id(self) -> str:
        return sample_id(self.raw)

    @cached_property
    def image(self) -> Image.Image:
        return self.load()

    def load(self, least: int | None = None) -> Image.Image:
        return decode_rgb(pair_bytes(self.raw)[0], least)

    @property
    def image_id(self) -> int:
        return stable_hash(image_identity(self.raw))

    def caption(self, rng: np.random.Generator) -> str:
        return pair_bytes(self.raw)[1]

    def label(self, caption: str) -> int:
        return stable_hash(caption)

    def augment(self, preprocess: Preprocess, rng: np.random.Generator) -> Image.Image:
        return training_view(self.load, preprocess, rng)


@dataclass
class ShardBatches(IterableDataset):
    """The endless micro-batches of one rank's streams; each loading process reads a stream of its own.

    A pass of stream s over the data reads every (number of streams)-th shard of an order drawn from (seed, pass), and
    draws samples through a buffer. A cursor [pass, samples drawn in it] tells where a stream stands.

    Args:
        shards, spec, reader: what is read, how, and what records become.
        cursors: where each of the rank's streams starts.
        turn: the stream that gives the first batch.
    """

    shards: list[str]
    spec: LoaderSpec
    reader: Reader
    cursors: list[list[int]]
    turn: int = 0

    def __iter__(self) -> Iterator[Payload]:
        info = get_worker_info()
        # Loading processes give batches in turn, so the first one takes the stream whose turn it is.
        return self.stream(self.turn if info is None else (self.turn + info.id) % len(self.cursors))

    def stream(self, stream: int) -> Iterator[Payload]:
        """Batches of the rank's `stream`-th stream, from its cursor on."""
        batch, num_good = Collector(self.reader), 0
        size = self.spec.batch_size // self.spec.accum
        num_pass, drawn = self.cursors[stream]
        while True:
            for sample in islice(self.samples(stream, num_pass), drawn, None):
                drawn += 1
                record = ShardRecord(sample)
                name = zlib.crc32(record.id.encode(errors="surrogatepass"))
                num_good += batch.add(record, np.random.default_rng([self.spec.seed, _SAMPLE, num_pass, name]))
                if len(batch) == size:
                    yield batch.payload([num_pass, drawn])
                    batch = Collector(self.reader)
            if num_good == 0 and self.cursors[stream][1] == 0:
                yield self._failure(batch)
                return
            num_pass, drawn, num_good = num_pass + 1, 0, 0
            self.cursors[stream] = [num_pass, 0]

    def samples(self, stream: int, num_pass: int) -> Iterator[Sample]:
        """The undecoded samples of one pass of a stream, in training order."""
        from webdataset.filters import shuffle  # noqa: PLC0415 (see `mmcore.data.sources.tar`)

        order = np.random.default_rng([self.spec.seed, _SHARDS, num_pass]).permutation(len(self.shards))
        first = self.spec.rank * len(self.cursors) + stream
        mine = order[first :: self.spec.world_size * len(self.cursors)]
        rng = random.Random(f"{self.spec.seed} {num_pass} {first}")
        buffered = shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)
        return buffered(shard_samples(self.shards[int(s)] for s in mine))

    def _failure(self, batch: Collector) -> Payload:
        reason = f"; {batch.broken[0][0]}: {batch.broken[0][1]}" if batch.broken else ""
        return Payload(
            broken=batch.broken,
            failure="data: shards must hold images (.jpg, .png, .webp) with captions (.txt) beside them, "
            f"but rank {self.spec.rank} found none among {len(batch.broken)} samples{reason}",
        )


class ShardLoader(TrainLoader):
    """Loader of shards, with `num_samples` in an epoch of all ranks; resuming rereads the pass up to the cursor without
    decoding.

    Raises:
        ValueError: fewer shards than streams, or a global batch larger than `num_samples`.
    """

    state_is_per_rank = True

    def __init__(
        self, shards: list[str], num_samples: int, spec: LoaderSpec, reader: Reader, tally: BrokenTally
    ) -> None:
        self._workers = num_workers(spec, min(8, len(shards) // spec.world_size))
        self._num_streams = max(1, self._workers)
        if spec.world_size * self._num_streams > len(shards):
            raise ValueError(
                f"data: world_size x workers must be at most the {len(shards)} shards, "
                f"got {spec.world_size} x {self._num_streams}"
            )
        if spec.global_batch > num_samples:
            raise ValueError(
                f"data: the global batch (batch_size {spec.batch_size} x {spec.world_size} ranks) "
                f"must be at most num_samples={num_samples}, got {spec.global_batch}"
            )
        super().__init__(spec, num_samples // spec.global_batch, tally, self._num_streams)
        self._shards, self._reader = shards, reader

    def _start(self, first: int) -> Iterator[Payload]:
        cursors, turn = [list(c) for c in self._cursors], first % self._num_streams
        batches = ShardBatches(self._shards, self.spec, self._reader, cursors, turn)
        return start_workers(batches, self._workers, None) if self._workers else iter(batches)

    def _identity(self) -> dict[str, Any]:
        of_spec = {name: getattr(self.spec, name) for name in ("batch_size", "rank", "world_size")}
        streams = {"num_streams": self._num_streams, "seed": self.spec.seed}
        return {"num_shards": len(self._shards)} | of_spec | streams


@dataclass(frozen=True)
class ShardSource:
    """Training pairs of shards, `num_samples` of them in an epoch."""

    shards: list[str]
    num_samples: int

    def captions(self) -> Iterator[str]:
        """Captions of all shards in order; a broken one is left out here and counted in training."""
        for sample in shard_samples(iter(self.shards)):
            try:
                yield pair_bytes(sample)[1]
            except BrokenRecord:
                continue

    def loader(self, spec: LoaderSpec, reader: Reader, tally: BrokenTally) -> ShardLoader:
        return ShardLoader(self.shards, self.num_samples, spec, reader, tally)


class IndexedShards:
    """Images of local shards in random access."""

    def __init__(self, pairs: list[IndexedPair]) -> None:
        self.pairs = pairs

    def sample_id(self, i: int) -> str:
        return f"{self.pairs[i].shard.rsplit('/', 1)[-1]}:{self.pairs[i].key}"

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return decode_rgb(read_range(*self.pairs[i].image), least)


def open_shards(config: DataConfig) -> tuple[ShardSource, EvalSet | None]:
    """Training shards `config.data`, and held-out pairs of `config.val_data` where that is given.

    Raises:
        ValueError: missing shards, shards on both sides, no pairs, or remote shards without `num_samples`.
    """
    shards = expand_shards(config.data, "data")
    held_out = None
    if config.val_data is not None:
        held_out_shards = expand_shards(config.val_data, "val_data")
        shared = set(shards) & set(held_out_shards)
        if shared:
            raise ValueError(f"data: val_data must not share shards with data, got {min(shared)} in both")
        held_out = _open_held_out(held_out_shards, config, f"val_data={config.val_data!r}")
    num_samples = config.num_samples
    if num_samples is None:
        remote = [s for s in shards if is_remote(s)]
        if remote:
            raise ValueError(f"data: num_samples must be given for shards that are not files, such as {remote[0]!r}")
        num_samples = sum(len(index_shard(s)) for s in shards)
    if num_samples < 2:
        raise ValueError(
            f"data: data={config.data!r} must hold at least 2 pairs (an image .jpg, .png or .webp and a .txt "
            f"of the same name), got {num_samples}"
        )
    return ShardSource(shards, num_samples), held_out


def open_held_out_shards(config: DataConfig) -> EvalSet:
    """All pairs of `config.data`, as what a model is measured on.

    Raises:
        ValueError: missing or remote shards, no pairs, too many broken ones.
    """
    return _open_held_out(expand_shards(config.data, "data"), config, f"data={config.data!r}")


def _open_held_out(shards: list[str], config: DataConfig, given: str) -> EvalSet:
    remote = [s for s in shards if is_remote(s)]
    if remote:
        raise ValueError(f"data: {given.split('=')[0]} must be local files, got {remote[0]!r}")
    tally = BrokenTally(config.max_broken, given)
    pairs: list[IndexedPair] = []
    captions: list[str] = []
    identities: list[str] = []
    for pair in (p for shard in shards for p in index_shard(shard)):
        with tally.record(f"{pair.shard}:{pair.key}"):
            caption = decode_caption(read_range(*pair.caption))
            sample: Sample = {"__url__": pair.shard, "__key__": pair.key}
            if pair.metadata is not None:
                sample[METADATA_SUFFIX] = read_range(*pair.metadata)
            identities.append(image_identity(sample))
            captions.append(caption)
            pairs.append(pair)
    tally.check(final=True)
    if not pairs:
        raise ValueError(f"data: {given} must hold at least one pair, got none")
    return by_image(IndexedShards(pairs), identities, captions, config.max_broken)
