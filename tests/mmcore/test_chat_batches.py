"""Batches of chats: padding, packing without a split, and LLaVA's order by modality and length."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.data.grouping import group_by_modality_length
from mmcore.data.text.chat_batches import collate, pack
from mmcore.data.text.templates import ChatSample
from tests.refusals import refuses

IGNORED, PAD = -100, 9


def sample(number: int, length: int) -> ChatSample:
    """A sample whose tokens tell its number, the later half of them learned."""
    tokens = torch.arange(length) + 1000 * number
    return ChatSample(tokens, torch.where(torch.arange(length) < length // 2, IGNORED, tokens))


def test_shorter_samples_are_padded_on_the_right_and_padding_is_not_learned() -> None:
    batch = collate([sample(1, 2), sample(2, 4)], PAD)
    assert batch.tokens.tolist() == [[1000, 1001, PAD, PAD], [2000, 2001, 2002, 2003]]
    assert batch.labels.tolist() == [[-100, 1001, -100, -100], [-100, -100, 2002, 2003]]
    assert batch.num_text.tolist() == [2, 4] and all(x.dtype == torch.int64 for x in batch)
    refuses("samples must be at least one, got none", collate, [], PAD)


def test_samples_stand_one_after_the_other_and_each_begins_anew() -> None:
    batch = pack([sample(i, n) for i, n in enumerate([2, 5, 1, 3, 3])], 6, PAD)
    assert batch.samples == [[1], [3, 0], [4, 2]] and batch.tokens[2].tolist() == [4000, 4001, 4002, 2000, PAD]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    assert batch.documents.tolist() == [[0] * 5, [0, 0, 0, 1, 1], [0, 0, 0, 1, -1]]
    assert batch.num_text.tolist() == [5, 5, 4]
    # a sample's first token would be predicted from the sample before it
    assert batch.labels[2].tolist() == [-100, 4001, 4002, -100, -100]


@pytest.mark.parametrize(("lengths", "max_length", "rows"), [
    # the first row with room: 11 and 7
    ([6, 5, 4, 3], 12, [[0, 3], [1, 2]]),
    # the shortest row: 7, which none has room for
    ([3, 3, 2, 2, 2], 6, [[0, 1], [2, 3, 4]]),
    # two of them in a row: 8, 8 and 4
    ([4, 4, 4, 4, 4], 8, [[0], [1], [2], [3], [4]]),
])  # fmt: skip
def test_rows_are_those_that_pad_least(lengths: list[int], max_length: int, rows: list[list[int]]) -> None:
    assert pack([sample(i, n) for i, n in enumerate(lengths)], max_length, PAD).samples == rows


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), room=st.integers(0, 30))
def test_packing_splits_nothing_loses_nothing_and_pads_less_than_half(lengths: list[int], room: int) -> None:
    max_length = max(lengths) + room
    samples = [sample(i, n) for i, n in enumerate(lengths)]
    batch = pack(samples, max_length, PAD)
    assert sorted(i for row in batch.samples for i in row) == list(range(len(lengths)))
    assert batch.tokens.shape[1] <= max_length
    for r, row in enumerate(batch.samples):
        place = 0
        for document, i in enumerate(row):
            span = slice(place, place + lengths[i])
            assert torch.equal(batch.tokens[r, span], samples[i].tokens)
            assert torch.equal(batch.labels[r, span][1:], samples[i].labels[1:]) and batch.labels[r, place] == IGNORED
            assert batch.position_ids[r, span].tolist() == list(range(lengths[i]))
            assert (batch.documents[r, span] == document).all()
            place += lengths[i]
        assert batch.num_text[r] == place
        assert (batch.documents[r, place:] == -1).all() and (batch.labels[r, place:] == IGNORED).all()
        assert (batch.tokens[r, place:] == PAD).all() and (batch.position_ids[r, place:] == 0).all()
    assert batch.tokens.numel() < 2 * sum(lengths) + max_length
    assert batch.tokens.numel() <= len(lengths) * max(lengths)


def test_samples_that_no_row_can_hold_are_errors() -> None:
    message = "samples must have 1 to 4 tokens each, got"
    refuses(f"{message} 5 of sample 1", pack, [sample(0, 3), sample(1, 5)], 4, PAD)
    refuses(f"{message} 0 of sample 0", pack, [sample(0, 0)], 4, PAD)
    refuses(f"{message} none", pack, [], 4, PAD)


LENGTHS = [7 * i % 11 + 1 for i in range(23)]
HAS_IMAGE = [i % 3 != 0 for i in range(23)]


def test_the_order_is_that_of_llavas_sampler() -> None:
    # as LLaVA's get_modality_length_grouped_indices gives it after torch.manual_seed(5), batches of 2 on 2 ranks
    want = [4, 16, 7, 6, 3, 18, 9, 15, 13, 11, 5, 8, 17, 19, 20, 1, 14, 22, 10, 2, 0, 12, 21]
    assert group_by_modality_length(LENGTHS, HAS_IMAGE, 2, 2, torch.Generator().manual_seed(5)) == want


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=60), st.integers(1, 4), st.integers(1, 3))
def test_every_index_comes_once_and_runs_are_of_one_modality_but_for_what_is_left_over(
    samples: list[tuple[int, bool]], batch_size: int, world_size: int
) -> None:
    lengths, has_image = [s[0] for s in samples], [s[1] for s in samples]
    order = group_by_modality_length(lengths, has_image, batch_size, world_size, torch.Generator().manual_seed(3))
    assert sorted(order) == list(range(len(samples)))
    size, counts = batch_size * world_size, Counter(has_image)
    starts = range(0, len(order), size)
    mixed = [start for start in starts if len({has_image[i] for i in order[start : start + size]}) > 1]
    assert all(start == 0 or start + size >= len(order) for start in mixed)
    assert len(mixed) <= (2 if all(counts[m] % size for m in (True, False)) else 1)


def test_lengths_and_sizes_that_no_order_has_are_errors() -> None:
    for lengths, batch_size, message in (
        ([5], 1, "lengths must be at least 1 for each of 2 samples, got 1, the least 5"),
        ([5, 0], 1, "lengths must be at least 1 for each of 2 samples, got 2, the least 0"),
        ([5, 5], 0, "batch_size and world_size must be at least 1, got 0 and 1"),
    ):
        refuses(message, group_by_modality_length, lengths, [True, False], batch_size, 1, torch.Generator())
