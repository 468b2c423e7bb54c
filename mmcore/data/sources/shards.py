"""Training and held-out pairs in webdataset tar shards, read as streams."""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from mmcore.data.broken import BrokenRecord, BrokenTally
from mmcore.data.config import DataConfig, LoaderSpec
from mmcore.data.loader import Collector, Payload, Reader, TrainLoader, check_global_batch, num_workers, start_workers
from mmcore.data.sources import tar
from mmcore.data.sources.base import EvalSet, Pair, PairSource, by_image, stable_hash
from mmcore.data.sources.captions import CaptionKeys, parse_caption_keys
from mmcore.data.transforms.images import decode_rgb
from mmcore.ops import require

SHUFFLE_BUFFER = 1_000
"""Undecoded samples among which the next one of a stream is drawn."""
_SHARDS, _SAMPLE = 0x54A4D5, 0x5A3B1F


@dataclass
class Streamed(PairSource):
    """Samples of a shard, undecoded."""

    samples: list[tar.Sample]
    keys: CaptionKeys = tar.TXT

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, i: int) -> str:
        return tar.sample_id(self.samples[i])

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return decode_rgb(tar.pair_bytes(self.samples[i], self.keys)[0], least)

    def image_id(self, i: int) -> int:
        return stable_hash(tar.image_identity(self.samples[i]))

    def all_captions(self, i: int) -> list[str]:
        return list(chain(*tar.pair_bytes(self.samples[i], self.keys)[1]))

    def caption(self, i: int, rng: np.random.Generator) -> str:
        return self.keys.draw(tar.pair_bytes(self.samples[i], self.keys)[1], rng)


@dataclass
class ShardBatches(IterableDataset):
    """The endless micro-batches of one rank's streams; each loading process reads a stream of its own.

    A pass of stream s over the data reads every (number of streams)-th shard of an order drawn from (seed, pass), and
    draws samples through a buffer. A cursor [pass, samples drawn in it] tells where a stream stands.
    """

    shards: list[str]
    spec: LoaderSpec
    reader: Reader
    cursors: list[list[int]]  # where each of the rank's streams starts
    turn: int = 0  # the stream that gives the first batch
    keys: CaptionKeys = tar.TXT

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
                record = Pair(Streamed([sample], self.keys), 0)
                name = zlib.crc32(record.id.encode(errors="surrogatepass"))
                num_good += batch.add(record, np.random.default_rng([self.spec.seed, _SAMPLE, num_pass, name]))
                if len(batch) == size:
                    yield batch.payload([num_pass, drawn])
                    batch = Collector(self.reader)
            if num_good == 0 and self.cursors[stream][1] == 0:
                yield Payload(broken=batch.broken, failure=self._failure(batch.broken))
                return
            num_pass, drawn, num_good = num_pass + 1, 0, 0
            self.cursors[stream] = [num_pass, 0]

    def samples(self, stream: int, num_pass: int) -> Iterator[tar.Sample]:
        """The undecoded samples of one pass of a stream, in training order."""
        from webdataset.filters import shuffle  # noqa: PLC0415 (see `mmcore.data.sources.tar`)

        order = np.random.default_rng([self.spec.seed, _SHARDS, num_pass]).permutation(len(self.shards))
        first = self.spec.rank * len(self.cursors) + stream
        mine = order[first :: self.spec.world_size * len(self.cursors)]
        rng = random.Random(f"{self.spec.seed} {num_pass} {first}")
        buffered = shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)
        return buffered(tar.shard_samples(self.shards[int(s)] for s in mine))

    def _failure(self, broken: list[tuple[str, str]]) -> str:
        reason = f"; {broken[0][0]}: {broken[0][1]}" if broken else ""
        if self.keys != tar.TXT:
            return f"data: shards must hold images with captions under {', '.join(self.keys.keys)}, got none{reason}"
        found = f"but rank {self.spec.rank} found none among {len(broken)} samples{reason}"
        return f"data: shards must hold images (.jpg, .png, .webp) with captions (.txt) beside them, {found}"


class ShardLoader(TrainLoader):
    """Loader of shards; resuming rereads the pass up to the cursor without decoding. Raises ValueError for fewer shards
    than streams, or a global batch larger than an epoch."""

    def __init__(self, source: "ShardSource", spec: LoaderSpec, reader: Reader, tally: BrokenTally) -> None:
        self._shards, self._reader, self._keys = source.shards, reader, source.keys
        self._workers = num_workers(spec, min(8, len(self._shards) // spec.world_size))
        self._num_streams = max(1, self._workers)
        sizes = len(self._shards), spec.world_size, self._num_streams
        fits = spec.world_size * self._num_streams <= len(self._shards)
        require("data", fits, "world_size x workers must be at most the {} shards, got {} x {}", *sizes)
        check_global_batch(spec, source.num_samples, f"num_samples={source.num_samples}")
        super().__init__(spec, source.num_samples // spec.global_batch, tally, self._num_streams)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.spec.workers is None and state["num_streams"] != self._num_streams:  # by default, those of the run
            self._workers = self._num_streams = state["num_streams"]
        super().load_state_dict(state)

    def _start(self, first: int) -> Iterator[Payload]:
        cursors, turn = [list(c) for c in self._cursors], first % self._num_streams
        batches = ShardBatches(self._shards, self.spec, self._reader, cursors, turn, self._keys)
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
    keys: CaptionKeys = tar.TXT

    def captions(self) -> Iterator[str]:
        """Captions of all shards in order; a broken one is left out here and counted in training."""
        for sample in tar.shard_samples(iter(self.shards)):
            try:
                yield from chain(*tar.pair_bytes(sample, self.keys)[1])
            except BrokenRecord:
                continue


@dataclass
class IndexedShards:
    """Images of local shards in random access."""

    pairs: list[tar.Sample]

    def sample_id(self, i: int) -> str:
        return tar.sample_id(self.pairs[i])

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return decode_rgb(tar.read_range(*tar.image_of(self.pairs[i])), least)


def open_shards(config: DataConfig) -> tuple[ShardSource, EvalSet | None]:
    """Training shards `config.data`, and held-out pairs of `config.val_data` where that is given; raises ValueError for
    missing shards, shards on both sides, no pairs, or remote shards without `num_samples`."""
    shards, keys = tar.expand_shards(config.data, "data"), keys_of_shards(config)
    held_out = None
    if config.val_data is not None:
        held_out_shards = tar.expand_shards(config.val_data, "val_data")
        check_other_shards(shards, held_out_shards)
        held_out = _open_held_out(held_out_shards, config, f"val_data={config.val_data!r}")
    num_samples = config.num_samples
    if num_samples is None:
        remote = next(filter(tar.is_remote, shards), None)
        what = "num_samples must be given for shards that are not files, such as {!r}"
        require("data", remote is None, what, remote)
        num_samples = sum(len(tar.index_shard(s, tar.suffixes_of(keys))) for s in shards)
    what = "data={!r} must hold at least 2 pairs (an image .jpg, .png or .webp and a .txt of the same name), got {}"
    if (
        num_samples == 1
        and config.num_samples is None
        and any(map(tar.has_dotted, chain(*map(tar.index_shard, shards))))
    ):
        what += f": {tar.DOTS}"
    require("data", num_samples >= 2, what, config.data, num_samples)
    return ShardSource(shards, num_samples, keys), held_out


def keys_of_shards(config: DataConfig) -> CaptionKeys:
    """What the captions of samples are."""
    if config.caption_keys is None:
        return tar.TXT
    keys = parse_caption_keys(config.caption_keys)
    tar.check_caption_keys(keys)
    return keys


def check_other_shards(train: list[str], val: list[str]) -> None:
    """A ValueError of shards on both sides."""
    shared = min(set(train) & set(val), default=None)
    require("data", shared is None, "val_data must not share shards with data, got {} in both", shared)


def open_held_out_shards(config: DataConfig) -> EvalSet:
    """All pairs of `config.data`, as what a model is measured on; raises ValueError for missing or remote shards, no
    pairs, too many broken ones."""
    return _open_held_out(tar.expand_shards(config.data, "data"), config, f"data={config.data!r}")


def _open_held_out(shards: list[str], config: DataConfig, given: str) -> EvalSet:
    remote = next(filter(tar.is_remote, shards), None)
    require("data", remote is None, "{} must be local files, got {!r}", given.split("=")[0], remote)
    tally = BrokenTally(config.max_broken, given)
    pairs: list[tar.Sample] = []
    captions: list[str] = []
    identities: list[str] = []
    keys = keys_of_shards(config)
    for pair in (p for shard in shards for p in tar.index_shard(shard, tar.suffixes_of(keys))):
        with tally.record(f"{pair['__url__']}:{pair['__key__']}"):
            tar.check_members(pair, keys == tar.TXT)
            texts = {s: tar.read_range(*pair[s]) for s in (tar.CAPTION_SUFFIX, tar.METADATA_SUFFIX) if s in pair}
            found = list(chain(*tar.read_texts(pair | texts, keys)))
            identities += [tar.image_identity(pair | texts)] * len(found)
            captions += found
            pairs += [pair] * len(found)
    tally.check(final=True)
    require("data", bool(pairs), "{} must hold at least one pair, got none", given)
    return by_image(IndexedShards(pairs), identities, captions, config.max_broken)
