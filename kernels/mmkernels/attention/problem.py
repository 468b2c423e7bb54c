"""What an attention call is given, and what all paths read of it in the same way."""

from dataclasses import dataclass, replace
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._masks import num_seen

Segment = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Checked operands.

    `segments`: keys and values `[B, Lk_s, Hkv, K]` of each segment, which lie behind one another. `ends`: lo and
    hi of the intervals, int32 `[B or 1, Lq]`, two or four of them, or none. `keys`: bool `[B or 1, Lk]`, those of the
    intervals that are seen; None for all. `bias`: bool or float `[B or 1, H or 1, Lq or 1, Lk]`. `alibi_slopes`:
    float32 `[B or 1, H]`. `seed`: int64 `[]`, with a dropout.
    """

    q: Tensor  # [B, Lq, H, K]
    segments: tuple[Segment, ...]
    ends: tuple[Tensor, ...]
    keys: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float

    @property
    def num_keys(self) -> int:
        return sum(k.shape[1] for k, _ in self.segments)

    @property
    def num_groups(self) -> int:
        """Query heads to a key head."""
        return self.q.shape[2] // self.segments[0][0].shape[2]

    @property
    def offset(self) -> int:
        """The key that lies beside query 0, bottom-right."""
        return self.num_keys - self.q.shape[1]

    def widened(self) -> "Problem":
        """The same in the accumulator's dtype."""
        dtype = accumulator(self.q.dtype)
        segments = tuple((k.to(dtype), v.to(dtype)) for k, v in self.segments)
        return replace(self, q=self.q.to(dtype), segments=segments)


class Operands(NamedTuple):
    """A problem as torch's registered ops take it, one after the other; the first six may want a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    k2: Tensor | None
    v2: Tensor | None
    bias: Tensor | None
    lo: Tensor | None
    hi: Tensor | None
    lo2: Tensor | None
    hi2: Tensor | None
    keys: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float

    @classmethod
    def of(cls, problem: Problem) -> "Operands":
        segments = (*(x for segment in problem.segments for x in segment), None, None)[:4]
        ends = (*problem.ends, None, None, None, None)[:4]
        rest = (problem.keys, problem.alibi_slopes, problem.seed, problem.scale, problem.dropout_p)
        return cls._make((problem.q, *segments, problem.bias, *ends, *rest))

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        return self[:6]

    def problem(self) -> Problem:
        second = () if self.k2 is None or self.v2 is None else ((self.k2, self.v2),)
        ends = tuple(x for x in (self.lo, self.hi, self.lo2, self.hi2) if x is not None)
        segments = ((self.k, self.v), *second)
        options = (self.alibi_slopes, self.seed, self.scale, self.dropout_p)
        return Problem(self.q, segments, ends, self.keys, self.bias, *options)


# in torch's language of schemas
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float"}
SCHEMA = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Operands).items())


def seen_tile(problem: Problem, batch: slice, rows: slice, cols: slice) -> Tensor | None:
    """Which keys of `cols` the queries of `rows` see by their intervals and the vector of keys, bool `[b, r, c]`; None
    for all."""
    if not problem.ends:
        return None
    places = torch.arange(cols.start, cols.stop, device=problem.q.device)
    ends = [(x if x.shape[0] == 1 else x[batch])[:, rows, None] for x in problem.ends]
    seen = (ends[0] <= places) & (places < ends[1])
    if len(ends) == 4:
        seen |= (ends[2] <= places) & (places < ends[3])
    if problem.keys is not None:
        seen = seen & (problem.keys if problem.keys.shape[0] == 1 else problem.keys[batch])[:, None, cols]
    return seen


def alibi_tile(problem: Problem, batch: slice, rows: slice, cols: slice) -> Tensor | None:
    """`-slope |i + Lk - Lq - j|`, in the accumulator's dtype, `[b, H, r, c]`."""
    if problem.alibi_slopes is None:
        return None
    device = problem.q.device
    places = torch.arange(rows.start, rows.stop, device=device)[:, None] + problem.offset
    distance = (places - torch.arange(cols.start, cols.stop, device=device)).abs()
    slopes = problem.alibi_slopes.to(accumulator(problem.q.dtype))
    return -(slopes if slopes.shape[0] == 1 else slopes[batch])[..., None, None] * distance


def empty_rows(problem: Problem) -> Tensor | None:
    """The rows that see no key, bool `[B or 1, H or 1, Lq]`; None where there can be none."""
    empty = None
    if problem.ends:
        empty = (num_seen(problem.ends, problem.keys) == 0)[:, None]
    if problem.bias is not None:
        seen = problem.bias if problem.bias.dtype == torch.bool else problem.bias > -torch.inf
        empty = ~seen.any(3)
    return empty


def with_uniform_rows(problem: Problem, out: Tensor, empty: Tensor) -> Tensor:
    """`out` with the mean of all values, of which dropout takes none, in the rows that see no key."""
    sums = [v.sum(1, keepdim=True, dtype=accumulator(out.dtype)) for _, v in problem.segments]
    total = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    mean = (total / max(problem.num_keys, 1)).to(out.dtype).repeat_interleave(problem.num_groups, 2)
    return torch.where(empty.transpose(1, 2)[..., None], mean, out)


def joined(problem: Problem) -> Problem:
    """The same with one segment of keys."""
    keys, values = zip(*problem.segments, strict=True)
    return replace(problem, segments=((torch.cat(keys, 1), torch.cat(values, 1)),))


def densified(problem: Problem) -> Problem:
    """The same with its intervals as a matrix."""
    seen = seen_tile(problem, slice(None), slice(0, problem.q.shape[1]), slice(0, problem.num_keys))
    return problem if seen is None else replace(problem, ends=(), keys=None, bias=seen[:, None])


def is_rich(problem: Problem) -> bool:
    """Whether a call has more than one interval a query: what costs registers."""
    extras = (problem.bias, problem.alibi_slopes, problem.seed)
    return len(problem.ends) > 2 or len(problem.segments) > 1 or any(x is not None for x in extras)


def has_kernel_backward(problem: Problem) -> bool:
    """ATen does a float bias, whose gradient may be wanted, and float32 of more than 128 per head, or 64 with
    extras, which spills somewhere at any tile size."""
    if problem.bias is not None and problem.bias.is_floating_point():
        return False
    return problem.q.dtype != torch.float32 or problem.q.shape[3] <= (64 if is_rich(problem) else 128)
