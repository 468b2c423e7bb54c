"""What the constructors of masks refuse, and in which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmkernels import masks

one, two = torch.tensor([[0, 1, 2]]), torch.tensor([[3, 3, 3]])
with_two = masks.intervals(3, one, two, one, two)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "joined to another length": (
        lambda: masks.causal(3, 4) & masks.causal(3, 5),
        ": & must join masks of equal lengths, got 3 and 3 queries, 4 and 5 keys",
    ),
    "joined two by two": (
        lambda: with_two & with_two,
        r": & must join masks of which one has one interval, got \(2, 2\)",
    ),
    "joined to dense": (
        lambda: with_two & masks.dense(torch.ones(3, 3)),  # pyright: ignore[reportOperatorIssue]
        ": & must join masks of intervals, got Dense",
    ),
    "joined to another batch": (
        lambda: masks.lengths(torch.ones(2).int(), 3, 3) & masks.lengths(torch.ones(3).int(), 3, 3),
        ": & must join masks of one batch or of equal batches, got 2 and 3",
    ),
    "one end of the second": (
        lambda: masks.intervals(3, one, two, one),
        ".intervals: lo2 and hi2 must come together, got one",
    ),
    "rank of lo": (
        lambda: masks.intervals(3, one[0], two[0]),
        r".intervals: lo must be \[B, Lq\], got shape \[3\]",
    ),
    "float lo": (
        lambda: masks.intervals(3, one.float(), two),
        ".intervals: lo must be of integers, got torch.float32",
    ),
    "bool hi2": (
        lambda: masks.intervals(3, one, two, one, two.bool()),
        ".intervals: hi2 must be of integers, got torch.bool",
    ),
    "shape of hi": (
        lambda: masks.intervals(3, one, two[:, :2]),
        r".intervals: hi must be \[1, 3\] on cpu like lo, got \[1, 2\] on cpu",
    ),
    "device of lo2": (
        lambda: masks.intervals(3, one, two, one.to("meta"), two),
        r".intervals: lo2 must be \[1, 3\] on cpu like lo, got \[1, 3\] on meta",
    ),
    "hi beyond the keys": (
        lambda: masks.intervals(2, one, two),
        ".intervals: ends must be from 0 to 2, got 0 to 3",
    ),
    "lo below 0": (
        lambda: masks.intervals(3, one - 1, two),
        ".intervals: ends must be from 0 to 3, got -1 to 3",
    ),
    "lo above hi": (
        lambda: masks.intervals(3, one, one.flip(1)),
        r".intervals: lo must be at most hi, got at \(0, 2\) 2 and 0",
    ),
    "lo2 above hi2": (
        lambda: masks.intervals(3, one, two, two, one),
        r".intervals: lo must be at most hi, got at \(0, 0\) 3 and 0",
    ),
    "rank of keys": (
        lambda: masks.key_padding(torch.ones(3).bool(), 2),
        r".key_padding: keys must be \[B, Lk\], got shape \[3\]",
    ),
    "integer keys": (
        lambda: masks.key_padding(one, 2),
        ".key_padding: keys must be bool, got torch.int64",
    ),
    "rank of num_seen": (
        lambda: masks.lengths(one, 2, 3),
        r".lengths: num_seen must be \[B\], got shape \[1, 3\]",
    ),
    "float num_seen": (
        lambda: masks.lengths(one[0].float(), 2, 3),
        ".lengths: num_seen must be of integers, got torch.float32",
    ),
    "num_seen beyond the keys": (
        lambda: masks.lengths(one[0], 2, 1),
        ".lengths: num_seen must be from 0 to 1, got 0 to 2",
    ),
    "rank of ids": (
        lambda: masks.documents(one[0]),
        r".documents: ids must be \[B, L\], got shape \[3\]",
    ),
    "float ids": (
        lambda: masks.documents(one.float()),
        ".documents: ids must be of integers, got torch.float32",
    ),
    "rank of prefix": (
        lambda: masks.prefix_causal(one, 3),
        r".prefix_causal: prefix must be \[B\], got shape \[1, 3\]",
    ),
    "prefix below 0": (
        lambda: masks.prefix_causal(one[0] - 1, 3),
        ".prefix_causal: prefix must be from 0 to 3, got -1 to 1",
    ),
    "rank of locations": (
        lambda: masks.media(one[0].bool(), 1, 1),
        r".media: locations must be \[B, Lq\], got shape \[3\]",
    ),
    "integer locations": (
        lambda: masks.media(one, 1, 1),
        ".media: locations must be bool, got torch.int64",
    ),
    "too many locations": (
        lambda: masks.media(one.bool(), 1, 4),
        ".media: num_media must be at least the 2 of locations, got 1",
    ),
    "rank of seen": (
        lambda: masks.tiles(one, 4),
        r".tiles: seen must be \[B, Lq, ...\], got shape \[1, 3\]",
    ),
    "rank of num_text": (
        lambda: masks.qformer_itc(4, one, 3),
        r".qformer_itc: num_text must be \[B\], got shape \[1, 3\]",
    ),
    "float num_text": (
        lambda: masks.qformer_itm(4, one[0].float(), 3),
        ".qformer_itm: num_text must be of integers, got torch.float32",
    ),
    "num_text beyond the text": (
        lambda: masks.qformer_itg(4, two[0], 2),
        ".qformer_itg: num_text must be from 0 to 2, got 3 to 3",
    ),
    "a matrix of one dimension": (
        lambda: masks.dense(torch.ones(3)),
        r".dense: values must be \[B, H, Lq, Lk\], got shape \[3\]",
    ),
    "a matrix of five": (
        lambda: masks.dense(torch.ones(1, 1, 1, 1, 1)),
        r".dense: values must be \[B, H, Lq, Lk\], got shape \[1, 1, 1, 1, 1\]",
    ),
    "an integer matrix": (
        lambda: masks.dense(one),
        ".dense: values must be bool or floating point, got torch.int64",
    ),
    "intervals of a float matrix": (
        lambda: masks.from_dense(torch.ones(3, 3)),
        ".from_dense: values must be bool, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^masks{message}$"):
        make()
