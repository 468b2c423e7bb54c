"""Every mask is the matrix that its published definition gives, written here as a plain double loop."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import attention, masks

Sees = Callable[[int, int, int], bool]  # whether, in a batch, a query sees a key


def matrix(batch: int, num_queries: int, num_keys: int, sees: Sees) -> Tensor:
    rows = [[[sees(b, i, j) for j in range(num_keys)] for i in range(num_queries)] for b in range(batch)]
    return torch.tensor(rows, dtype=torch.bool).reshape(batch, 1, num_queries, num_keys)


def assert_is(mask: masks.Mask, expected: Tensor) -> None:
    assert torch.equal(mask.to_dense(), expected)
    if isinstance(mask, masks.Intervals):  # whose ends pass the check of those that a user gives
        masks.intervals(mask.num_keys, *(x for pair in mask.pairs for x in pair))


def bits(*rows: str) -> Tensor:
    """Rows of `1` and `.` as bool."""
    return torch.tensor([[x == "1" for x in row] for row in rows])


def ends(*values: int) -> Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize("sizes", [(5, None), (3, 7), (7, 3), (4, 0), (1, 6)], ids=str)
def test_causal_lets_the_last_query_see_all_keys(sizes: tuple[int, int | None]) -> None:
    num_queries, num_keys = sizes[0], sizes[0] if sizes[1] is None else sizes[1]
    mask = masks.causal(*sizes)
    # query i stands beside key i + Lk - Lq
    expected = matrix(1, num_queries, num_keys, lambda b, i, j: j <= i + num_keys - num_queries)
    assert_is(mask, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_lengths_are_of_the_keys_seen(dtype: torch.dtype) -> None:
    num_seen = [0, 3, 5]
    mask = masks.lengths(torch.tensor(num_seen, dtype=dtype), 4, 5)
    assert_is(mask, matrix(3, 4, 5, lambda b, i, j: j < num_seen[b]))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_see_themselves_alone(causal: bool) -> None:
    ids = [[0, 0, 0, 1, 1, 2, 2, 2], [5, 3, 3, 4, -1, -1, -2, -1], [-1, 7, -1, 8, 9, 9, 9, 0]]
    mask = masks.documents(torch.tensor(ids), causal=causal)
    expected = matrix(3, 8, 8, lambda b, i, j: ids[b][i] == ids[b][j] and ids[b][i] >= 0 and (j <= i or not causal))
    assert_is(mask, expected)


@pytest.mark.parametrize("sizes", [(6, None), (3, 6), (6, 3)], ids=str)
def test_a_prefix_is_seen_by_all_and_the_rest_causally(sizes: tuple[int, int | None]) -> None:
    num_queries, num_keys = sizes[0], sizes[0] if sizes[1] is None else sizes[1]
    prefix = [0, 2, num_keys]
    mask = masks.prefix_causal(torch.tensor(prefix), *sizes)
    expected = matrix(3, num_queries, num_keys, lambda b, i, j: j < prefix[b] or j <= i + num_keys - num_queries)
    assert_is(mask, expected)


@pytest.mark.parametrize("latest", [True, False])
def test_text_sees_the_images_before_it(latest: bool) -> None:
    rows = ["..1...1.", "1.1.1...", "........", ".......1"]
    places = [[t for t, x in enumerate(row) if x == "1"] for row in rows]

    def sees(b: int, i: int, j: int) -> bool:
        so_far = [image for image, place in enumerate(places[b]) if place <= i]
        return j // 4 in (so_far[-1:] if latest else so_far)

    mask = masks.media(bits(*rows), 3, 4, latest=latest)
    assert_is(mask, matrix(4, 8, 12, sees))


class TestTiles:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
    def test_a_group_is_seen_whole(self, dtype: torch.dtype) -> None:
        """As Llama-3.2-Vision's cross_attention_mask `[B, Lq, image, tile]`."""
        seen = torch.zeros(2, 5, 2, 4, dtype=dtype)
        seen[0, 1:, 0, :3] = 1
        seen[0, 3:, 1, 1:2] = 1
        seen[1, 2:, 1, :] = 1
        mask = masks.tiles(seen, 3)
        assert isinstance(mask, masks.Intervals)
        expected = matrix(2, 5, 24, lambda b, i, j: bool(seen[b, i, j // 3 // 4, j // 3 % 4]))
        assert_is(mask, expected)

    def test_of_images_alone_in_three_runs_are_dense(self) -> None:
        seen = bits("1.1.1", "11111")[None]
        mask = masks.tiles(seen, 2)
        assert isinstance(mask, masks.Dense)
        assert_is(mask, matrix(1, 2, 10, lambda b, i, j: bool(seen[b, i, j // 2])))


class TestQFormer:
    """Figure 2 of arXiv:2301.12597; the text that is padding is seen by nobody."""

    num_text = (0, 2, 4)
    arguments = (3, torch.tensor(num_text), 4)

    def expect(self, mask: masks.Intervals, sees: Sees) -> None:
        expected = matrix(3, 7, 7, lambda b, i, j: j - 3 < self.num_text[b] and sees(b, i, j))
        assert_is(mask, expected)

    def test_contrastive_keeps_queries_and_text_apart(self) -> None:
        self.expect(masks.qformer_itc(*self.arguments), lambda b, i, j: (i < 3) == (j < 3))

    def test_matching_lets_all_see_all(self) -> None:
        self.expect(masks.qformer_itm(*self.arguments), lambda b, i, j: True)

    def test_generation_hides_text_from_queries_and_from_the_text_before_it(self) -> None:
        self.expect(masks.qformer_itg(*self.arguments), lambda b, i, j: j < 3 or 3 <= j <= i)

    def test_both_at_once_keep_the_text_and_the_text_to_generate_apart(self) -> None:
        def sees(b: int, i: int, j: int) -> bool:
            if i < 3:
                return j < 3
            if i < 7:
                return 3 <= j < 3 + self.num_text[b]
            return j < 3 or 7 <= j <= min(i, 6 + self.num_text[b])

        assert_is(masks.qformer_pairs(*self.arguments), matrix(3, 11, 11, sees))


class TestKeyPadding:
    rows = ("111111", "111...", "..1111", "1.1.11", "......", "11..11")

    @pytest.mark.parametrize("sizes", [(6, False), (6, True), (3, False)], ids=str)
    def test_hides_the_padding_from_every_query(self, sizes: tuple[int, bool]) -> None:
        keys = bits(*self.rows)
        assert_is(masks.key_padding(keys, sizes[0]), matrix(6, sizes[0], 6, lambda b, i, j: bool(keys[b, j])))

    @pytest.mark.parametrize("name", ["causal", "prefix", "packed", "media", "two intervals", "shared"])
    def test_joins_any_intervals(self, name: str) -> None:
        keys = bits(*self.rows)
        mask = {
            "causal": masks.causal(6),
            "prefix": masks.prefix_causal(torch.tensor([0, 1, 2, 3, 4, 6]), 6),
            "packed": masks.documents(torch.tensor([[0, 0, 0, 1, 1, -1]] * 6)),
            "media": masks.media(bits(*["1..1.."] * 6), 2, 3, latest=False),
            "two intervals": masks.qformer_pairs(2, torch.tensor([0, 1, 2, 2, 1, 2]), 2),
            "shared": masks.key_padding(bits("11.111"), 6),
        }[name]
        for both in (mask & masks.key_padding(keys, 6), masks.key_padding(keys, 6) & mask):
            assert both.num_batches == 6
            assert_is(both, mask.to_dense() & keys[:, None, None])
            if name != "two intervals":
                assert torch.equal(both.num_seen, both.to_dense()[:, 0].sum(2).expand_as(both.num_seen))

    def test_of_a_run_is_skipped_on_either_side(self) -> None:
        both = masks.causal(6) & masks.key_padding(bits(*self.rows[:3]), 6)
        assert both.lo.tolist()[2] == [2] * 6 and both.hi.tolist()[1] == [1, 2, 3, 3, 3, 3]

    def test_moves_to_a_device_with_its_mask(self) -> None:
        moved = masks.key_padding(bits(*self.rows), 6).to("meta")
        assert moved.keys is not None and moved.keys.device.type == "meta"


class TestDense:
    def test_takes_two_to_four_dimensions(self) -> None:
        values = torch.randn(2, 4, 3, 5)
        for given_values, shape in ((values[0, 0], (1, 1, 3, 5)), (values[:, 0], (2, 1, 3, 5)), (values, None)):
            mask = masks.dense(given_values)
            assert_is(mask, given_values.reshape(shape or values.shape))
        assert (mask.num_batches, mask.num_queries, mask.num_keys) == (2, 3, 5)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(rows=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
    def test_is_intervals_where_no_row_has_three_runs(self, rows: list[list[bool]]) -> None:
        values = torch.tensor(rows)
        runs = [sum(y and not x for x, y in zip([False, *row], row, strict=False)) for row in rows]
        mask = masks.from_dense(values)
        assert isinstance(mask, masks.Dense) == (max(runs) > 2)
        assert_is(mask, values[None, None])

    def test_without_keys_is_intervals_of_nothing(self) -> None:
        for mask in (
            masks.from_dense(torch.ones(2, 1, 3, 0, dtype=torch.bool)),
            masks.key_padding(torch.ones(2, 0, dtype=torch.bool), 3),
            masks.tiles(torch.ones(2, 3, 0, 4), 5),
        ):
            assert isinstance(mask, masks.Intervals) and mask.to_dense().shape == (2, 1, 3, 0)


@st.composite
def random_intervals(draw: st.DrawFn, num_pairs: int) -> masks.Intervals:
    """Masks of three queries and nine keys."""
    batch = draw(st.sampled_from([1, 2]))
    size = num_pairs * 2 * batch * 3
    places = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)))
    return masks.intervals(9, *places.view(num_pairs, 2, batch, 3).sort(1).values.flatten(0, 1))


class TestIntervals:
    def test_are_half_open_and_may_be_empty(self) -> None:
        mask = masks.intervals(6, ends(0, 2, 6), ends(0, 5, 6))
        assert torch.equal(mask.to_dense()[0, 0], bits("......", "..111.", "......"))

    def test_a_key_of_both_counts_once(self) -> None:
        both = masks.intervals(8, ends(2, 0), ends(6, 8), ends(4, 3), ends(7, 5))
        union = masks.intervals(8, ends(2, 0), ends(7, 8))
        assert_is(both, union.to_dense())
        q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 8, 1, 4)
        torch.testing.assert_close(attention(q, k, k, mask=both), attention(q, k, k, mask=union))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_come_back_from_their_matrix(self, data: st.DataObject) -> None:
        mask = data.draw(random_intervals(data.draw(st.sampled_from([1, 2]))))
        found = masks.from_dense(mask.to_dense())
        assert isinstance(found, masks.Intervals)
        assert_is(found, mask.to_dense())
        # each seen key lies in one interval
        assert sum((hi - lo).sum() for lo, hi in found.pairs) == mask.to_dense().sum()

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_joined_are_what_both_see(self, data: st.DataObject) -> None:
        sides = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
        one, other = (data.draw(random_intervals(side)) for side in sides)
        both = one & other
        assert len(both.pairs) == max(sides)
        assert_is(both, one.to_dense() & other.to_dense())

    def test_move_whole_to_a_device_as_dense_ones_do(self) -> None:
        moved = masks.intervals(8, ends(2, 0), ends(6, 8), ends(4, 3), ends(7, 5)).to("meta")
        assert {x.device.type for pair in moved.pairs for x in pair} == {"meta"} == {moved.device.type}
        assert (moved.num_keys, moved.num_queries, len(moved.pairs)) == (8, 2, 2)
        assert masks.dense(torch.ones(3, 4)).to("meta").device.type == "meta"


LENGTH = 100_000
places = torch.arange(LENGTH)[None]
LONG: dict[str, Callable[[], masks.Mask]] = {
    "causal": lambda: masks.causal(LENGTH),
    "key_padding": lambda: masks.key_padding((places < 10) | (places > 1000), LENGTH),
    "lengths": lambda: masks.lengths(torch.tensor([LENGTH // 2]), LENGTH, LENGTH),
    "documents": lambda: masks.documents(places // 1000),
    "prefix_causal": lambda: masks.prefix_causal(torch.tensor([1000]), LENGTH),
    "media": lambda: masks.media(places % 1000 == 0, 100, 1000),
    "tiles": lambda: masks.tiles(places[..., None] % 5 == torch.tensor([0, 1, 1, 3]), LENGTH // 4),
    "qformer_itc": lambda: masks.qformer_itc(1000, torch.tensor([1000]), LENGTH - 1000),
    "qformer_itm": lambda: masks.qformer_itm(1000, torch.tensor([1000]), LENGTH - 1000),
    "qformer_itg": lambda: masks.qformer_itg(1000, torch.tensor([1000]), LENGTH - 1000),
    "qformer_pairs": lambda: masks.qformer_pairs(1000, torch.tensor([1000]), LENGTH // 2 - 500),
}


@pytest.mark.parametrize("name", LONG)
def test_at_most_four_numbers_a_query_are_stored(name: str) -> None:
    mask = LONG[name]()
    assert isinstance(mask, masks.Intervals) and (mask.num_queries, mask.num_keys) == (LENGTH, LENGTH)
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for y in mask.pairs for x in y}
    assert sum(stored.values()) <= 4 * 4 * LENGTH
    assert mask.keys is None or mask.keys.shape == (1, LENGTH)


# those that read no value to make their mask
COMPILED: dict[str, tuple[Callable[..., masks.Intervals], Tensor]] = {
    "causal": (lambda x: masks.causal(x.shape[0], 7, device=x.device), torch.ones(5)),
    "lengths": (lambda x: masks.lengths(x, 5, 7), torch.tensor([0, 7])),
    "documents": (masks.documents, torch.tensor([[0, 0, 1, -1], [3, 4, 4, 4]])),
    "prefix_causal": (lambda x: masks.prefix_causal(x, 5, 7), torch.tensor([0, 3])),
    "media": (lambda x: masks.media(x, 2, 3), bits(".1..1", "....1")),
    "qformer_itg": (lambda x: masks.qformer_itg(3, x, 4), torch.tensor([0, 3])),
    "qformer_pairs": (lambda x: masks.qformer_pairs(3, x, 4), torch.tensor([0, 3])),
    "joined": (lambda x: masks.lengths(x, 7, 7) & masks.causal(7, device=x.device), torch.tensor([0, 3])),
    "key_padding": (lambda x: masks.key_padding(x, 3), bits("..1.11", "......")),
    "padded": (lambda x: masks.causal(6, device=x.device) & masks.key_padding(x, 6), bits("..1.11", "111...")),
    "padded and packed": (
        lambda x: masks.documents(x) & masks.key_padding(x % 3 > 0, 7),
        torch.tensor([[1, 1, 2, 2, 3, 3, 3]]),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_constructor_that_reads_no_value_compiles_whole(name: str) -> None:
    make, argument = COMPILED[name]
    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(argument).to_dense(), make(argument).to_dense())


@pytest.mark.parametrize("name", COMPILED)
def test_a_constructor_that_reads_no_value_needs_none(name: str) -> None:
    make, argument = COMPILED[name]
    there, here = make(argument.to("meta")), make(argument)
    shapes = [[x.shape for pair in mask.pairs for x in pair] for mask in (there, here)]
    assert shapes[0] == shapes[1] and there.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("name", COMPILED)
def test_a_constructor_that_reads_no_value_never_waits_for_the_device(name: str) -> None:
    make, argument = COMPILED[name]
    on_device = argument.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = make(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mask.to("cpu").to_dense(), make(argument).to_dense())
