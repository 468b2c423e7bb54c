"""The pieces that an attention matrix is cut into: together exactly what the mask leaves."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import masks
from mmkernels.attention import pieces
from mmkernels.attention.pieces import Limits, bias_of, blocks
from mmkernels.attention.problem import Problem


def problem_of(mask: masks.Mask | None, batch: int, num_queries: int, num_keys: int) -> Problem:
    ends = tuple(x for pair in mask.pairs for x in pair) if isinstance(mask, masks.Intervals) else ()
    k = torch.ones(batch, num_keys, 1, 4)
    bias = mask.values if isinstance(mask, masks.Dense) else None
    return Problem(torch.ones(batch, num_queries, 1, 4), ((k, k),), ends, bias, None, None, 1.0, 0.0)


def counted(problem: Problem, limits: Limits) -> Tensor:
    """How often each weight is computed, `[B, Lq, Lk]`."""
    counts = torch.zeros(problem.q.shape[0], problem.q.shape[1], problem.num_keys, dtype=torch.int64)
    for batches, rows, found in blocks(problem, limits):
        for piece in found:
            assert (piece.batch, piece.rows) == (batches, rows)
            size = [s.stop - s.start for s in (batches, rows, piece.cols)]
            rows_allowed = limits.masked_rows if piece.kind == "masked" else limits.rows
            most = (limits.batches, rows_allowed, limits.cols)
            assert all(0 < n <= m for n, m in zip(size, most, strict=True))
            seen = torch.ones(size, dtype=torch.bool)
            if piece.kind == "causal":
                seen = seen.tril()
            bias = bias_of(problem, piece)
            if bias is not None:
                seen &= bias[:, 0] == 0
            counts[batches, rows, piece.cols] += seen
    return counts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_weight_that_a_mask_leaves_is_computed_once(data: st.DataObject) -> None:
    batch, num_queries = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 90))
    num_keys = data.draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    num_ends = data.draw(st.sampled_from([2, 4]))
    shared = data.draw(st.booleans())
    size = (num_ends, 1 if shared else batch, num_queries)
    ends = torch.randint(num_keys + 1, size, generator=generator)
    if data.draw(st.booleans()):  # runs of equal rows
        ends = ends[:, :, torch.arange(num_queries) // 37]
    ends = torch.cat([pair.sort(0).values for pair in ends.split(2)])
    mask = masks.intervals(num_keys, *ends)
    batches, rows, masked_rows, cols = (data.draw(st.sampled_from([1, 7, 40, 1 << 30])) for _ in range(4))
    limits = Limits(batches, rows, min(masked_rows, rows), cols)
    counts = counted(problem_of(mask, batch, num_queries, num_keys), limits)
    assert torch.equal(counts, mask.to_dense()[:, 0].long().expand_as(counts))


CAUSAL: dict[str, tuple[masks.Intervals, set[str]]] = {
    "square": (masks.causal(200), {"causal"}),
    "more keys": (masks.causal(100, 300), {"full", "causal"}),
    "more queries": (masks.causal(300, 100), {"masked", "full", "causal"}),
    "documents": (masks.documents((torch.arange(400) // 130)[None]), {"causal"}),
    "prefix": (masks.prefix_causal(torch.tensor([100]), 200), {"masked", "full", "causal"}),
}


@pytest.mark.parametrize("case", CAUSAL)
@pytest.mark.parametrize("rows", [64, 1 << 30])
def test_a_causal_corner_needs_no_mask(case: str, rows: int) -> None:
    mask, allowed = CAUSAL[case]
    problem = problem_of(mask, 1, mask.num_queries, mask.num_keys)
    limits = Limits(1, rows, rows, 1 << 30)
    kinds = [piece.kind for _, _, found in blocks(problem, limits) for piece in found]
    assert "causal" in kinds and set(kinds) <= allowed | {"full"}
    assert torch.equal(counted(problem, limits), mask.to_dense()[:, 0].long())


def test_rows_that_see_nothing_have_no_pieces() -> None:
    mask = masks.lengths(torch.tensor([0]), 50, 60)
    assert not any(found for _, _, found in blocks(problem_of(mask, 1, 50, 60), Limits(1, 8, 8, 8)))


def test_a_dense_mask_is_made_for_few_samples_at_a_time_unless_they_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MASK_ENTRIES", 2 * 9 * 20 + 1)
    limits = Limits(1 << 30, 1 << 30, 1 << 30, 1 << 30)
    for num_masks, starts in ((5, [0, 2, 4]), (1, [0])):
        mask = masks.dense(torch.ones(num_masks, 9, 20, dtype=torch.bool))
        found = blocks(problem_of(mask, 5, 9, 20), limits)
        assert [batches.start for batches, _, _ in found] == starts


def test_only_rows_that_need_a_mask_are_cut_for_it() -> None:
    lo = torch.cat([torch.zeros(40), torch.arange(31)])[None].int()  # row 39 is the first that grows
    mask = masks.intervals(90, lo, torch.full_like(lo, 90))
    found = [rows for _, rows, _ in blocks(problem_of(mask, 1, 71, 90), Limits(1, 999, 8, 999))]
    assert found[0] == slice(0, 40) and all(rows.stop - rows.start <= 8 for rows in found[1:])


def test_rows_with_equal_intervals_are_one_full_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MIN_ROWS", 4)
    mask = masks.media(torch.arange(60)[None] % 20 == 0, 3, 50)
    found = [p for _, _, some in blocks(problem_of(mask, 1, 60, 150), Limits(1, 999, 999, 999)) for p in some]
    places: Any = [(p.rows.start, p.cols.start, p.cols.stop, p.kind) for p in found]
    assert places == [(0, 0, 50, "full"), (20, 50, 100, "full"), (40, 100, 150, "full")]
