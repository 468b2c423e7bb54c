"""Masks of intervals as other libraries take them; each in O(L), of tensors on the mask's device."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import require
from mmkernels._masks import num_seen
from mmkernels.attention.problem import Problem

# Queries and keys of a block of FlexAttention's.
FLEX_BLOCK = 128


def bounded(problem: Problem) -> Problem:
    """The same with intervals, of all keys where it has none."""
    if problem.ends:
        return problem
    lo = torch.zeros(1, problem.q.shape[1], dtype=torch.int32, device=problem.q.device)
    return replace(problem, ends=(lo, torch.full_like(lo, problem.num_keys)))


class Blocks(NamedTuple):
    """For each block of queries the blocks of keys that some of them see but not all, and those that all do: how many,
    int32 `[b, 1, q]`, and which, these first, int32 `[b, 1, q, k]`. `sees` tells of a batch, a head, a query and a key
    whether it is seen."""

    num_partial: Tensor
    partial: Tensor
    num_full: Tensor
    full: Tensor
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def blocks_of(problem: Problem) -> Blocks:
    """FlexAttention's `BlockMask`, whose own constructor computes the whole matrix."""
    num_keys, batch = problem.num_keys, problem.q.shape[0]
    device, keys = problem.q.device, problem.keys
    starts = torch.arange(0, num_keys, FLEX_BLOCK, device=device)
    visible = full = torch.zeros((), dtype=torch.bool, device=device)
    pairs = [
        tuple(x.expand(batch, -1) for x in pair) for pair in zip(problem.ends[0::2], problem.ends[1::2], strict=True)
    ]
    for lo, hi in pairs:
        some = lo < hi
        first, last = _of_blocks(torch.where(some, lo, num_keys), num_keys, torch.amin), _of_blocks(hi, 0, torch.amax)
        visible = visible | ((first < starts + FLEX_BLOCK) & (last > starts))
        # rows that are none see nothing
        all_first, all_last = _of_blocks(lo, num_keys, torch.amax), _of_blocks(hi, 0, torch.amin)
        full = full | ((all_first <= starts) & (starts + FLEX_BLOCK <= all_last))
    if keys is not None:
        padded = F.pad(keys, (0, -num_keys % FLEX_BLOCK)).unflatten(1, (-1, FLEX_BLOCK))
        visible, full = visible & padded.any(2)[:, None], full & padded.all(2)[:, None]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = [(lo[b, i] <= j) & (j < hi[b, i]) for lo, hi in pairs]
        found = seen[0] if len(seen) == 1 else seen[0] | seen[1]
        if keys is None:
            return found
        return found & keys[b if keys.shape[0] > 1 else b * 0, j]

    return Blocks(*_listed(visible & ~full), *_listed(full), sees)


def _of_blocks(x: Tensor, beyond: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`[b, Lq]` reduced over blocks of queries, `[b, q, 1]`."""
    return reduce(F.pad(x, (0, -x.shape[1] % FLEX_BLOCK), value=beyond).unflatten(1, (-1, FLEX_BLOCK)), 2)[..., None]


def _listed(hits: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row, and which, in order, before all others."""
    order = hits.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return hits.sum(2, dtype=torch.int32)[:, None], order.int()[:, None].contiguous()


def endpoints_of(problem: Problem) -> Tensor:
    """cuDNN's endpoints F of `[0, F0) U [F1, F2) U ...`, int32 `[1, 3 or 5, B Lq]`, which never fall."""
    batch = problem.q.shape[0]
    pairs = [(lo, torch.maximum(lo, hi)) for lo, hi in zip(problem.ends[0::2], problem.ends[1::2], strict=True)]
    if len(pairs) == 2:
        # an interval of nothing is the first, one that begins in the other ends it
        (lo, hi), (lo2, hi2) = ((torch.where(lo < hi, lo, 0), torch.where(lo < hi, hi, 0)) for lo, hi in pairs)
        is_second = lo2 < lo
        lo, hi, lo2, hi2 = (torch.where(is_second, *x) for x in ((lo2, lo), (hi2, hi), (lo, lo2), (hi, hi2)))
        lo2 = torch.maximum(lo2, hi)
        pairs = [(lo, hi), (lo2, torch.maximum(lo2, hi2))]
    rows = [torch.zeros_like(pairs[0][0]), *(x for pair in pairs for x in pair)]
    return torch.stack([x.expand(batch, -1).flatten() for x in rows])[None].contiguous()


def columns_of(problem: Problem) -> Tensor:
    """FlashMask's rows of each key, int32 `[B, 1, Lk, 2]`: the end of those that see it, and the first of them.

    Of intervals of which neither end ever falls from a query to the next, so that the rows are a run.
    """
    lo, hi = problem.ends
    batch, num_keys = problem.q.shape[0], problem.num_keys
    places = torch.arange(num_keys, device=lo.device, dtype=torch.int32).expand(len(lo), -1).contiguous()
    # queries up to which lo <= key, and up to which hi <= key
    last, first = (torch.searchsorted(x.contiguous(), places, right=True, out_int32=True) for x in (lo, hi))
    columns = torch.stack([last, first], 2).expand(batch, -1, -1)
    if problem.keys is not None:
        columns = torch.where(problem.keys[..., None], columns, 0)
    return columns[:, None].contiguous()


class Sequences(NamedTuple):
    """Runs of queries of all samples, each of which sees a run of keys, or, causally, those of it up to its own: where
    they begin, int32 `[n + 1]`, and the longest."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    is_causal: bool


def sequences_of(problem: Problem, backend: str) -> Sequences:
    """What functions of "variable length" take. Keys that nobody sees are a sequence without queries.

    The values of the mask are read, for which a GPU is waited for.

    Raises:
        ValueError: a mask that is not such runs, side by side.
    """
    batch, num_queries, num_keys = problem.q.shape[0], problem.q.shape[1], problem.num_keys
    lo, hi = (x.expand(batch, -1).long() for x in problem.ends)
    starts = torch.ones_like(lo, dtype=torch.bool)
    starts[:, 1:] = lo[:, 1:] != lo[:, :-1]
    rows = starts.flatten().nonzero()[:, 0].cpu()
    ends = torch.cat([rows[1:], torch.tensor([batch * num_queries])])
    sample, lo, hi = rows // num_queries * num_keys, lo.flatten().cpu(), hi.flatten().cpu()
    first, last = sample + lo[rows], sample + hi[ends - 1]
    # of a causal run the keys end with its last query
    places = torch.arange(batch * num_queries)
    run = torch.searchsorted(rows, places, right=True) - 1
    causally = torch.maximum(lo, hi[ends - 1][run] - (ends[run] - 1 - places))
    is_full, is_causal = bool((hi == hi[ends - 1][run]).all()), bool((hi == causally).all())
    apart = bool((first[1:] >= last[:-1]).all())
    has_no_gap = problem.keys is None or bool((num_seen(problem.ends, problem.keys).flatten().cpu() == hi - lo).all())
    sentence = "mask must be runs of queries that see a run of keys, or its past, side by side, got others for {}"
    require("attention", apart and has_no_gap and (is_full or is_causal), sentence, backend)
    # before each run the keys that nobody sees, and after the last
    before = torch.stack([first, last], 1).flatten()
    of_keys = torch.cat([torch.zeros(1, dtype=torch.long), before, torch.tensor([batch * num_keys])])
    of_rows = torch.cat([torch.zeros(1, dtype=torch.long), torch.stack([rows, ends], 1).flatten(), ends[-1:]])
    device = problem.q.device
    return Sequences(
        of_rows.int().to(device),
        of_keys.int().to(device),
        int((ends - rows).max()),
        int(of_keys.diff().max()),
        not is_full,
    )
