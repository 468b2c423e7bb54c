"""What a mask of `mmkernels.masks` is: intervals of keys and a vector of keys, or a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import require


@dataclass(frozen=True, eq=False)
class Intervals:
    """Query i of batch b sees, of the keys from `lo[b, i]` to `hi[b, i]` - 1 and of those of a second interval, the
    ones that are True in `keys[b]`.

    Make one with the functions of `mmkernels.masks`, or with its `intervals`, which checks it.
    """

    num_keys: int
    lo: Tensor  # int32 [B or 1, Lq]
    hi: Tensor
    lo2: Tensor | None = None
    hi2: Tensor | None = None
    keys: Tensor | None = field(default=None, kw_only=True)  # bool [B or 1, Lk]; None = all of the intervals'
    is_causal: bool = field(default=False, kw_only=True)  # exactly `causal`, which libraries have a name for
    is_ordered: bool = field(default=False, kw_only=True)  # neither end falls from a query to the next, as is known

    @property
    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The intervals, one or two."""
        if self.lo2 is None or self.hi2 is None:
            return ((self.lo, self.hi),)
        return (self.lo, self.hi), (self.lo2, self.hi2)

    @property
    def num_batches(self) -> int:
        return self.lo.shape[0] if self.keys is None else max(self.lo.shape[0], self.keys.shape[0])

    @property
    def num_queries(self) -> int:
        return self.lo.shape[1]

    @property
    def device(self) -> torch.device:
        return self.lo.device

    def to(self, device: torch.device | str) -> "Intervals":
        tensors = (self.lo, self.hi, self.lo2, self.hi2, self.keys)
        *ends, keys = (None if x is None else x.to(device) for x in tensors)
        return replace(self, **dict(zip(("lo", "hi", "lo2", "hi2", "keys"), (*ends, keys), strict=True)))

    @property
    def num_seen(self) -> Tensor:
        """How many keys each query sees, `[B or 1, Lq]`; those of both intervals count twice."""
        return num_seen([x for pair in self.pairs for x in pair], self.keys)

    def to_dense(self) -> Tensor:
        """The matrix, bool `[B or 1, 1, Lq, Lk]`."""
        places = torch.arange(self.num_keys, device=self.device)
        seen = torch.stack([(lo[..., None] <= places) & (places < hi[..., None]) for lo, hi in self.pairs]).any(0)
        return (seen if self.keys is None else seen & self.keys[:, None])[:, None]

    def among(self, keys: Tensor) -> "Intervals":
        """Of the keys that are seen those that are True in `keys`, bool `[B or 1, Lk]`.

        Ends stay between the first and the last of these, so that padding on either side is skipped by whole tiles.
        """
        places = torch.arange(self.num_keys, device=keys.device, dtype=torch.int32)
        # one column more: of no key
        first = F.pad(torch.where(keys, places, self.num_keys), (0, 1), value=self.num_keys).amin(1, keepdim=True)
        last = F.pad(torch.where(keys, places + 1, 0), (0, 1)).amax(1, keepdim=True)
        ends = []
        for lo, hi in self.pairs:
            lo = torch.minimum(torch.maximum(lo, first), last)
            ends += [lo, torch.maximum(torch.minimum(hi, last), lo)]
        keys = keys if self.keys is None else keys & self.keys
        return Intervals(self.num_keys, *ends, keys=keys, is_ordered=self.is_ordered)

    def __and__(self, other: "Intervals") -> "Intervals":
        """The keys that both see; of two intervals each there could be three, which is refused."""
        known = isinstance(other, Intervals)
        require("masks", known, "& must join masks of intervals, got {}", type(other).__name__)
        batches = self.num_batches, other.num_batches
        fit = 1 in batches or batches[0] == batches[1]
        require("masks", fit, "& must join masks of one batch or of equal batches, got {} and {}", *batches)
        require(
            "masks",
            (self.num_queries, self.num_keys) == (other.num_queries, other.num_keys),
            "& must join masks of equal lengths, got {} and {} queries, {} and {} keys",
            self.num_queries,
            other.num_queries,
            self.num_keys,
            other.num_keys,
        )
        sides = len(self.pairs), len(other.pairs)
        require("masks", sides != (2, 2), "& must join masks of which one has one interval, got {}", sides)
        joined = [
            torch.broadcast_tensors(torch.maximum(lo, lo2), torch.minimum(hi, hi2))
            for lo, hi in self.pairs
            for lo2, hi2 in other.pairs
        ]
        ends = [end for lo, hi in joined for end in (lo, torch.maximum(lo, hi))]
        both = Intervals(self.num_keys, *ends, is_ordered=self.is_ordered and other.is_ordered)
        for keys in (self.keys, other.keys):
            both = both if keys is None else both.among(keys)
        return both


@dataclass(frozen=True, eq=False)
class Dense:
    """Any matrix `[B or 1, H or 1, Lq or 1, Lk]`: bool, True where a query sees a key, or added to the logits."""

    values: Tensor

    @property
    def num_keys(self) -> int:
        return self.values.shape[3]

    @property
    def num_batches(self) -> int:
        return self.values.shape[0]

    @property
    def num_queries(self) -> int:
        return self.values.shape[2]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, device: torch.device | str) -> "Dense":
        return replace(self, values=self.values.to(device))

    def to_dense(self) -> Tensor:
        """The matrix itself."""
        return self.values


Mask = Intervals | Dense


def num_seen(ends: Sequence[Tensor], keys: Tensor | None) -> Tensor:
    """How many keys, of those that are True in `keys`, the intervals hold, `[B or 1, Lq]`."""
    if keys is not None:
        before = F.pad(keys.cumsum(1), (1, 0))  # [B or 1, Lk + 1], how many are seen before each place
        batch = max(len(keys), len(ends[0]))
        ends = [before.expand(batch, -1).gather(1, x.long().expand(batch, -1)) for x in ends]
    return torch.stack([hi - lo for lo, hi in zip(ends[0::2], ends[1::2], strict=True)]).sum(0)
