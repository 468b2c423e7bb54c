"""An attention matrix cut into the pieces that have to be computed: what a mask leaves out is in none of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.attention.problem import Problem, alibi_tile, seen_tile

# Entries of a mask that are made at a time: 8 MiB of float32.
MASK_ENTRIES = 1 << 21
# Rows whose intervals jump are cut apart, but not into fewer than this: a call has its price.
MIN_ROWS = 32
# Keys that only some rows of a block see: so few are masked beside those that all see, more are a piece of their own.
MIN_COLS = 64


@dataclass(frozen=True)
class Piece:
    """Some rows against some keys. `kind`: "full", "causal" (row i sees the keys up to i, both counted from the
    piece's corner), "padded" (all see those that are no padding) or "masked"."""

    batch: slice
    rows: slice
    cols: slice
    kind: str


class Limits(NamedTuple):
    """What a piece has at most; beside one for which a mask has to be made, `masked_rows`."""

    batches: int
    rows: int
    masked_rows: int
    cols: int


def blocks(problem: Problem, limits: Limits) -> Iterator[tuple[slice, slice, list[Piece]]]:
    """Batches and rows, and their pieces, which are none where the rows see nothing."""
    batch, num_queries = problem.q.shape[:2]
    if not problem.ends:
        kind, most = ("full", limits.rows) if problem.bias is None else ("masked", limits.masked_rows)
        for batches in _cut(0, batch, min(limits.batches, _mask_batches(problem, most))):
            for rows in _cut(0, num_queries, most):
                yield batches, rows, _of_cols(batches, rows, 0, problem.num_keys, kind, limits.cols)
        return
    ends = torch.stack([x.expand(problem.ends[0].shape) for x in problem.ends]).cpu()  # [2 or 4, B or 1, Lq]
    gaps = _gaps(problem.keys)
    shared = ends.shape[1] == len(gaps) == 1
    for batches in _cut(0, batch, limits.batches if shared else 1):
        of_batch = ends[:, batches.start if ends.shape[1] > 1 else 0]
        gaps_of_batch = gaps[batches.start if len(gaps) > 1 else 0]
        of_batch = _beside(of_batch, gaps_of_batch)
        for run in _row_runs(of_batch):
            pieces = _of_rows(batches, run, of_batch, gaps_of_batch, limits.cols)
            has_mask = any(piece.kind == "masked" for piece in pieces)
            most = limits.masked_rows if has_mask else limits.rows
            if run.stop - run.start <= most:
                yield batches, run, pieces
                continue
            for rows in _cut(run.start, run.stop, most):
                yield batches, rows, _of_rows(batches, rows, of_batch, gaps_of_batch, limits.cols)


def bias_of(problem: Problem, piece: Piece) -> Tensor | None:
    """What is added to the logits of a piece, float `[b or 1, H or 1, r, c]`, -inf where a key is not seen."""
    batch, rows, cols = piece.batch, piece.rows, piece.cols
    bias = alibi_tile(problem, batch, rows, cols)
    dtype = problem.q.dtype if problem.q.dtype == torch.float64 else torch.float32
    if piece.kind == "padded" and problem.keys is not None:
        keys = problem.keys if problem.keys.shape[0] == 1 else problem.keys[batch]
        hidden = _infinite(~keys[:, None, None, cols], dtype)
        return hidden if bias is None else bias + hidden
    if piece.kind != "masked":
        return bias
    if problem.bias is not None:
        values = problem.bias if problem.bias.shape[0] == 1 else problem.bias[batch]
        values = (values if values.shape[2] == 1 else values[:, :, rows])[..., cols]
        values = values.to(dtype) if values.is_floating_point() else _infinite(~values, dtype)
        bias = values if bias is None else bias + values
    seen = seen_tile(problem, batch, rows, cols)
    if seen is not None:
        hidden = _infinite(~seen[:, None], dtype)
        bias = hidden if bias is None else bias + hidden
    return bias


def _infinite(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _cut(first: int, last: int, most: int) -> Iterator[slice]:
    for start in range(first, last, most):
        yield slice(start, min(start + most, last))


def _row_runs(ends: Tensor) -> Iterator[slice]:
    """Runs of rows, cut where an interval jumps, or begins to grow from row to row, or ceases to."""
    steps = ends.diff(dim=1)
    smooth = (steps == 0) | (steps == 1)
    some = (ends[0::2] < ends[1::2]).any(0)
    changes = torch.zeros_like(some)
    changes[1:] = (~smooth).any(0) | (some[1:] != some[:-1])
    bends = (steps.diff(dim=1) != 0) & smooth[:, 1:] & smooth[:, :-1]
    changes[1:-1] |= bends.any(0) & some[1:-1]
    num_rows, start = ends.shape[1], 0
    for cut in [*changes.nonzero()[:, 0].tolist(), num_rows]:
        if cut - start >= MIN_ROWS or cut == num_rows:
            yield slice(start, cut)
            start = cut


def _col_blocks(ends: Tensor) -> Iterator[tuple[int, int, str]]:
    """First and last key and kind of the pieces that the rows' intervals `[2 or 4, r]` need."""
    spans = []
    for lo, hi in zip(ends[0::2], ends[1::2], strict=True):
        some = lo < hi
        if some.any():
            spans.append((lo, hi, int(lo[some].min()), int(hi[some].max())))
    if len(spans) == 2 and spans[0][2] < spans[1][3] and spans[1][2] < spans[0][3]:
        # they may overlap: a key counts once
        yield min(spans[0][2], spans[1][2]), max(spans[0][3], spans[1][3]), "masked"
        return
    for lo, hi, first, last in spans:
        yield from _interval_blocks(lo, hi, first, last)


def _interval_blocks(lo: Tensor, hi: Tensor, first: int, last: int) -> Iterator[tuple[int, int, str]]:
    common_first, common_last = int(lo.max()), int(hi.min())
    corner, last_kind = last - len(lo), "masked"
    if corner >= common_first and torch.equal(hi - corner, torch.arange(1, len(hi) + 1, dtype=hi.dtype)):
        common_last, last_kind = corner, "causal"
    elif common_last - common_first < MIN_COLS:
        yield first, last, "full" if (common_first, common_last) == (first, last) else "masked"
        return
    edges = ((first, common_first, "masked"), (common_first, common_last, "full"), (common_last, last, last_kind))
    yield from (edge for edge in edges if edge[0] < edge[1])


def _gaps(keys: Tensor | None) -> list[list[tuple[int, int]]]:
    """For each batch, or for all of them, the runs of keys that nobody sees, first and last."""
    if keys is None:
        return [[]]
    # a key that is seen on either side
    steps = F.pad((~keys).to(torch.int8), (1, 1)).diff(dim=1).cpu()
    found: list[list[tuple[int, int]]] = [[] for _ in keys]
    for (row, first), last in zip((steps == 1).nonzero().tolist(), (steps == -1).nonzero()[:, 1].tolist(), strict=True):
        found[row].append((first, last))
    return found


def _beside(ends: Tensor, gaps: Sequence[tuple[int, int]]) -> Tensor:
    """Ends `[2 or 4, Lq]` that lie in a long gap moved to its edge: the rows beyond it are pieces of their own."""
    for begin, end in gaps:
        if end - begin < MIN_COLS:
            continue
        lo, hi = ends[0::2], ends[1::2]
        lo = torch.where((begin <= lo) & (lo < end), end, lo)
        hi = torch.where((begin < hi) & (hi <= end), begin, hi)
        ends = torch.stack([lo, torch.maximum(lo, hi)], 1).flatten(0, 1)
    return ends


def _around(first: int, last: int, kind: str, gaps: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, str]]:
    """A piece without the keys that nobody sees: cut where these are many, or at its edge, padded where few."""
    start, found = first, kind
    for begin, end in gaps:
        begin, end = max(begin, first), min(end, last)
        if begin >= end:
            continue
        if begin > start and end < last and end - begin < MIN_COLS:
            found = "padded" if found in ("full", "padded") else "masked"
            continue
        if begin > start:
            # what is cut is no triangle
            yield start, begin, "masked" if found == "causal" else found
        start, found = end, "masked" if kind == "causal" else kind
    if start < last:
        yield start, last, found


def _of_rows(batch: slice, rows: slice, ends: Tensor, gaps: Sequence[tuple[int, int]], max_cols: int) -> list[Piece]:
    pieces = []
    for block in _col_blocks(ends[:, rows]):
        for first, last, kind in _around(*block, gaps):
            pieces += _of_cols(batch, rows, first, last, kind, max_cols)
    return pieces


def _of_cols(batch: slice, rows: slice, first: int, last: int, kind: str, max_cols: int) -> list[Piece]:
    # a causal piece that is cut is one no more
    kind = "masked" if kind == "causal" and last - first > max_cols else kind
    return [Piece(batch, rows, cols, kind) for cols in _cut(first, last, max_cols)]


def _mask_batches(problem: Problem, max_rows: int) -> int:
    """For how many samples a mask is made at a time."""
    given = [x for x in (problem.bias, problem.alibi_slopes) if x is not None]
    if all(x.shape[0] == 1 for x in given):
        return problem.q.shape[0] or 1
    rows = min(problem.q.shape[1], max_rows)
    heads = 1 if problem.alibi_slopes is None else problem.q.shape[2]
    heads = heads if problem.bias is None else max(heads, problem.bias.shape[1])
    return max(MASK_ENTRIES // max(heads * rows * problem.num_keys, 1), 1)
