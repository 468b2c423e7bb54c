"""Masks of transformers' models as intervals: the same matrix, stored and examined once."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    eager_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from mmcore.integrations import interval_mask
from mmcore.integrations.interval_mask import IntervalMask, seen_by
from mmcore.integrations.transformers import attention_mask, register
from mmkernels import masks

LEAST = torch.finfo(torch.float32).min


PATTERNS = (
    causal_mask_function,
    bidirectional_mask_function,
    sliding_window_causal_mask_function(3),
    sliding_window_bidirectional_mask_function(2),
    partial(chunked_causal_mask_function, 4),
)


def of_batch(function: Any, left_padding: Tensor) -> Any:
    return function(left_padding) if isinstance(function, partial) else function


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_mask_holds_what_eagers_does(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    batch_size, q_length, kv_length, kv_offset = number(1, 3), number(1, 6), number(1, 9), number(0, 3)
    seed = torch.Generator().manual_seed(number(0, 1000))
    keys = torch.randint(0, 3, (batch_size, number(1, kv_length + kv_offset)), generator=seed) > 0
    request = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": number(0, 4),
        "kv_offset": kv_offset,
        "mask_function": of_batch(data.draw(st.sampled_from(PATTERNS)), torch.arange(batch_size)),
        "attention_mask": data.draw(st.sampled_from([None, keys])), "allow_is_causal_skip": data.draw(st.booleans()),
        "dtype": data.draw(st.sampled_from([torch.float32, torch.bfloat16])), "device": torch.device("cpu"),
    }  # fmt: skip
    mask, expected = attention_mask(**request), eager_mask(**request)
    if mask is None:
        assert request["allow_is_causal_skip"] and not expected.any()
    else:
        assert isinstance(mask, IntervalMask) and isinstance(mask.seen.mask, masks.Intervals)
        assert mask.dtype == expected.dtype and torch.equal(mask + 0, expected)
        assert mask.seen.empty_rows == ("zero" if (expected == 0).any(3).all() else "uniform")


@pytest.mark.parametrize("function", PATTERNS)
@pytest.mark.parametrize("has_padding", [True, False])
def test_on_a_device_that_is_waited_for_no_value_is_read(function: Any, has_padding: bool) -> None:
    meta = torch.device("meta")
    keys = torch.ones(3, 9, dtype=torch.int64, device=meta) if has_padding else None
    function = of_batch(function, torch.zeros(3, dtype=torch.int64, device=meta))
    mask = attention_mask(
        batch_size=3, q_length=9, kv_length=9, q_offset=0, kv_offset=0, mask_function=function, attention_mask=keys,
        dtype=torch.float32, device=meta,
    )  # fmt: skip
    if function is bidirectional_mask_function and not has_padding:
        assert mask is None
        return
    assert isinstance(mask, IntervalMask) and isinstance(mask.seen.mask, masks.Intervals)
    # what is padding there is unknown
    assert mask.seen.empty_rows == ("uniform" if has_padding else "zero")
    assert (mask.seen.mask.keys is not None) == has_padding


def plain(num_queries: int, num_keys: int, keys: Tensor | None = None) -> Tensor:
    mask = attention_mask(
        batch_size=2, q_length=num_queries, kv_length=num_keys, q_offset=num_keys - num_queries, kv_offset=0,
        mask_function=causal_mask_function, attention_mask=keys, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    assert mask is not None
    return mask


def test_a_causal_mask_with_padding_stores_two_ends_a_query() -> None:
    mask = plain(1000, 4000, torch.arange(4000)[None].expand(2, -1) > 5)
    assert isinstance(mask, IntervalMask) and isinstance(mask.seen.mask, masks.Intervals)
    ends = [x for pair in mask.seen.mask.pairs for x in pair]
    assert sum(x.numel() for x in ends) == 2 * 2 * 1000
    assert mask.data_ptr() == 0  # it has no matrix


def of_packed(attn: str, position_ids: Tensor) -> Any:
    """What a model of transformers makes its mask of."""
    register()
    config = LlamaConfig()
    config._attn_implementation = attn
    return create_causal_mask(config, torch.zeros(*position_ids.shape, 4), None, None, position_ids=position_ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3))
def test_the_mask_of_packed_samples_is_eagers_and_stores_two_ends_a_query(starts: list[list[bool]]) -> None:
    places = torch.arange(8).expand(len(starts), -1)
    begins = torch.tensor([[True, *row] for row in starts])
    position_ids = places - torch.where(begins, places, 0).cummax(1).values
    mask = of_packed("mmkernels", position_ids)
    assert isinstance(mask, IntervalMask) and isinstance(mask.seen.mask, masks.Intervals)
    expected = of_packed("eager", position_ids)
    assert torch.equal((mask + 0).expand_as(expected), expected)


def test_a_causal_mask_without_padding_keeps_its_name_for_the_libraries_that_know_it() -> None:
    for keys in (None, torch.ones(2, 5, dtype=torch.bool)):
        mask = plain(3, 5, keys)
        assert isinstance(mask, IntervalMask) and isinstance(mask.seen.mask, masks.Intervals)
        assert mask.seen.mask.is_causal and mask.seen.empty_rows == "zero"


def test_whatever_is_done_to_a_mask_is_done_to_its_matrix() -> None:
    mask = plain(3, 5)
    matrix = mask + 0
    assert not isinstance(matrix, IntervalMask)
    assert mask.shape == (2, 1, 3, 5) and matrix.unique().tolist() == [LEAST, 0]
    assert torch.equal(mask[:, :, :, :4], matrix[:, :, :, :4])
    assert torch.equal(torch.cat([matrix, mask]), torch.cat([matrix, matrix]))
    assert torch.equal(mask.to(torch.float16), matrix.to(torch.float16))
    assert torch.equal(mask.repeat(1, 4, 1, 1) == 0, matrix.repeat(1, 4, 1, 1) == 0) and "-3.4028e+38" in repr(mask)


def test_a_float_mask_of_0_and_the_least_number_is_intervals() -> None:
    seen = torch.zeros(2, 1, 3, 6, dtype=torch.bool)
    seen[0, 0, :, 2:4] = True
    seen[1, 0, 0, 1] = seen[1, 0, 0, 4:] = True
    # a model may have added to the least number
    for mask in (seen, *(torch.where(seen, 0.0, x) for x in (LEAST, -torch.inf, 0.9 * LEAST))):
        found = seen_by(mask, 3)
        assert isinstance(found.mask, masks.Intervals) and torch.equal(found.mask.to_dense(), seen)
        assert found.empty_rows == "uniform"  # queries 1 and 2 of sample 1 see nothing
    assert seen_by(torch.where(seen, 0.0, LEAST)[:1], 3).empty_rows == "zero"


def test_a_mask_with_other_numbers_is_added_hides_what_the_least_number_does_and_gets_its_gradient() -> None:
    mask = torch.tensor([0.0, -2.0, LEAST, -1e4], dtype=torch.bfloat16)[None, None, None].requires_grad_()
    found = seen_by(mask, 1)
    assert isinstance(found.mask, masks.Dense) and found.mask.values.dtype == torch.float32
    assert torch.equal(found.mask.values, mask.float().masked_fill(mask < -1e30, -torch.inf))
    (gradient,) = torch.autograd.grad(found.mask.values[..., [0, 1, 3]].sum(), mask)
    assert gradient.flatten().tolist() == [1, 1, 0, 1]


def test_a_mask_is_examined_once_for_all_layers_and_again_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    examined = []
    find = interval_mask._find
    monkeypatch.setattr(interval_mask, "_find", lambda *args: examined.append(args) or find(*args))
    mask = torch.zeros(1, 1, 2, 3)
    first = seen_by(mask, 2)
    assert seen_by(mask, 2) is first and len(examined) == 1
    mask[..., 0] = LEAST
    assert not seen_by(mask, 2).mask.to_dense()[..., 0].any() and len(examined) == 2
    examined.clear()
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 2, 3)
        assert seen_by(mask, 2) is seen_by(mask, 2) and len(examined) == 1
