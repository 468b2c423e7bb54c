"""A measurement that the ranks of a run share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from PIL import Image

from mmcore.data.sources.base import Measured

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of the ranks this is, and of how many; all of them call the same in the same order. What is found is the
    same for any number, to the bit: they share batches, whose sizes do not depend on the ranks."""

    rank: int = 0
    count: int = 1

    def shared(self, total: int, size: int, work: Callable[[range], T]) -> list[T]:
        """What `work` makes of [0, total) by parts of at most `size`, in order, on every rank. Where none is left for
        a rank it works on an empty part, which is dropped: ZeRO-3 wants a model to run as often on all ranks."""
        found: list[T] = []
        for first in range(0, total, size * self.count):
            start = min(first + size * self.rank, total)
            own = work(range(start, min(start + size, total)))
            everyone: list[Any] = [own] * self.count
            if self.count > 1:
                dist.all_gather_object(everyone, own)
            found += everyone
        return found[: -(-total // size)]

    def over(
        self, images: Measured, size: int, work: Callable[[list[Image.Image], list[int]], T], *, most: int | None = None
    ) -> list[T]:
        """As `shared`, what `work` makes of `images`, the first `most` of them, and their positions, less those that
        are broken: where none is left, of a blank one without a position. A ValueError of too many broken ones."""
        total = len(images) if most is None else min(most, len(images))

        def of(part: range) -> tuple[T, list[tuple[str, str]]]:
            good, positions, broken = images.read(part)
            return work(good or [Image.new("RGB", (32, 32))], positions), broken

        found = self.shared(total, size, of)
        images.check_broken(total, [pair for _, broken in found for pair in broken])
        return [x for x, _ in found]


ALONE = Ranks()
