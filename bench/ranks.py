"""Many ranks in one process: a thread a rank, and a transport of queues and barriers in the place of
`torch.distributed`, which counts what every rank sends."""

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from mmcore.losses import contrastive, ranks, shards, softmax
from mmcore.nn import batch_norm

T = TypeVar("T")
# The modules that a contrastive loss talks through.
TALKING = (contrastive, ranks, shards, softmax, batch_norm)


@dataclass
class P2POp:
    """A send or a receive, as torch's."""

    op: Callable[..., Any]
    tensor: Tensor
    group: None = None
    group_peer: int = 0


class Transfer:
    """Of a receive: waits for what was sent."""

    def __init__(self, tensor: Tensor, line: "queue.SimpleQueue[Tensor] | None") -> None:
        self.tensor, self.line = tensor, line

    def wait(self) -> None:
        if self.line is not None:
            self.tensor.copy_(self.line.get(timeout=600))


@dataclass
class Ranks:
    """`torch.distributed` as `mmcore.losses` uses it, of the default group.

    Attributes:
        size: how many ranks.
        sent: bytes that each rank sends in rings, by operation: of a gather and of a scattered sum all parts but
            one, of an all-reduce twice as much.
    """

    size: int
    sent: list[Counter[str]] = field(init=False)
    ReduceOp = ReduceOp
    P2POp = P2POp

    def __post_init__(self) -> None:
        self.sent = [Counter() for _ in range(self.size)]
        self._place = threading.local()
        self._box: list[Any] = [None] * self.size
        self._barrier = threading.Barrier(self.size, timeout=600)
        self._lines: dict[tuple[int, int], queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What `work` returns on each rank; the first error of any."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def on_rank(rank: int) -> None:
            self._place.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:  # noqa: BLE001 (raised again below; the others must not wait for ever)
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=on_rank, args=(rank,), daemon=True) for rank in range(self.size)]
        with self._installed():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return results

    @contextmanager
    def _installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in TALKING:
                stack.enter_context(mock.patch.object(module, "dist", self))
            yield

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group: None = None) -> int:
        return self.size

    def get_rank(self, group: None = None) -> int:
        return self._place.rank

    def all_gather(self, out: Sequence[Tensor], x: Tensor, group: None = None) -> None:
        self._count("all_gather", x.nbytes * (self.size - 1))
        for mine, theirs in zip(out, self._exchanged(x), strict=True):
            mine.copy_(theirs)
        self._meet()

    def reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], group: None = None) -> None:
        self._count("reduce_scatter", out.nbytes * (self.size - 1))
        rank = self.get_rank()
        out.zero_()
        for theirs in self._exchanged(list(parts)):
            out += theirs[rank]
        self._meet()

    def all_reduce(self, x: Tensor, op: Any = ReduceOp.SUM, group: None = None) -> None:
        self._count("all_reduce", 2 * x.nbytes * (self.size - 1) / self.size)
        total = torch.zeros_like(x)
        for i, theirs in enumerate(self._exchanged(x)):
            if op == ReduceOp.MAX and i:
                torch.maximum(total, theirs, out=total)
            else:
                total += theirs
        self._meet()  # all have read, before any writes
        x.copy_(total)

    def isend(self) -> None:
        """A name, for `P2POp`."""

    def irecv(self) -> None:
        """Likewise."""

    def batch_isend_irecv(self, ops: Sequence[P2POp]) -> list[Transfer]:
        rank, transfers = self.get_rank(), []
        for x in ops:
            if x.op == self.isend:
                self._count("send", x.tensor.nbytes)
                self._lines[rank, x.group_peer].put(x.tensor)
                transfers.append(Transfer(x.tensor, None))
            else:
                transfers.append(Transfer(x.tensor, self._lines[x.group_peer, rank]))
        return transfers

    def _count(self, name: str, size: float) -> None:
        self.sent[self.get_rank()][name] += size  # pyright: ignore[reportArgumentType]

    def _exchanged(self, value: Any) -> list[Any]:
        """What every rank has, until they meet again."""
        self._box[self.get_rank()] = value
        self._meet()
        return list(self._box)

    def _meet(self) -> None:
        self._barrier.wait()


class Alone(Ranks):
    """One rank of many, on the thread that calls it: it computes and holds what a rank does, and hears its own
    features from all others."""

    def run(self, work: Callable[[int], T]) -> list[T]:
        self._place.rank = 0
        with self._installed():
            return [work(0)]

    def _exchanged(self, value: Any) -> list[Any]:
        return [value] * self.size

    def _meet(self) -> None:
        return

    def batch_isend_irecv(self, ops: Sequence[P2POp]) -> list[Transfer]:
        sends = [x for x in ops if x.op == self.isend]
        receives = [x for x in ops if x.op != self.isend]
        for sent, received in zip(sends, receives, strict=True):
            self._count("send", sent.tensor.nbytes)
            received.tensor.copy_(sent.tensor)
        return []
