"""`open_data`: names of sources, settings out of range or without effect, and the broken-record limit."""

from __future__ import annotations

import logging

import pytest

from mmcore.data import DataConfig, open_data
from mmcore.data.broken import BrokenTally


@pytest.mark.parametrize(
    ("name", "near"), [("digit", "digits"), ("Digits", "digits"), ("stamp", "stamps"), ("stmaps", "stamps")]
)
def test_a_misspelt_source_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'; did you mean '{near}'"):
        open_data(DataConfig(data=name), seed=0)


def test_an_unknown_source_tells_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"data must be 'digits', 'stamps', tar shards .*, got 'laion'$"):
        open_data(DataConfig(data="laion"), seed=0)


@pytest.mark.parametrize(
    ("data", "change"),
    [
        ("digits", {"val_data": "x.csv"}),
        ("digits", {"language": "zh_CN"}),
        ("digits", {"num_samples": 5}),
        ("digits", {"stamps_dir": "x"}),
        ("stamps", {"csv_separator": ","}),
        ("stamps", {"val_data": "x.csv"}),
        ("x.csv", {"num_samples": 5}),
        ("x.tar", {"csv_img_key": "img"}),
        ("x.tar", {"csv_caption_key": "text"}),
        ("x.tar", {"val_fraction": 0.5}),
        ("x.csv", {"image_root": "x"}),
        ("digits", {"annotations": "x.json"}),
        ("x.tar", {"val_annotations": "x.json"}),
        ("x.json", {"csv_separator": ","}),
        ("x.json", {"num_samples": 5}),
    ],
)
def test_a_setting_without_effect_is_refused(data: str, change: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(change))}=.* has no effect on '{data}'"):
        open_data(DataConfig(data=data, **change), seed=0)


def test_a_split_beside_held_out_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"val_fraction=0.5 has no effect beside val_data='y.csv'"):
        open_data(DataConfig(data="x.csv", val_data="y.csv", val_fraction=0.5), seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("val_fraction", float("nan")),
        ("max_broken", 1.1),
        ("max_broken", -0.1),
        ("max_broken", float("nan")),
        ("num_samples", 0),
        ("workers", -1),
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"data: {name} must be .*got {value}"):
        open_data(DataConfig(data="x.tar", **{name: value}), seed=0)  # pyright: ignore[reportArgumentType]


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        open_data(DataConfig(), seed=-1)


def test_the_limit_has_slack_within_an_epoch_and_none_at_its_end() -> None:
    tally = BrokenTally(0.01, "x")
    tally.add(99, [("a", "bad")] * 50)
    tally.check(final=False)
    with pytest.raises(ValueError, match=r"50 of 99 records of x are broken \(bad 50\); the first is a"):
        tally.check(final=True)
    tally = BrokenTally(0.01, "x")
    tally.add(400, [(str(i), "bad") for i in range(10)])
    tally.check(final=False)
    with pytest.raises(ValueError, match="10 of 400"):
        tally.check(final=True)
    # 4 are allowed, and three times the square root of 4 on top.
    tally.add(0, [("11", "worse")])
    with pytest.raises(ValueError, match=r"11 of 400 .* \(bad 10, worse 1\)"):
        tally.check(final=False)
    tally.add(700)
    tally.check(final=True)


def test_a_limit_of_zero_stops_at_the_first_and_of_one_never() -> None:
    strict, lenient = BrokenTally(0.0, "x"), BrokenTally(1.0, "x")
    for tally in (strict, lenient):
        tally.add(1, [("a", "bad")])
    with pytest.raises(ValueError, match="1 of 1"):
        strict.check(final=False)
    lenient.check(final=True)


def test_each_broken_record_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tally = BrokenTally(1.0, "x")
    with caplog.at_level(logging.WARNING, "mmcore.data"):
        for _ in range(3):
            tally.add(2, [("a", "bad"), ("b", "worse")])
    assert caplog.messages == ["skipped a: bad", "skipped b: worse"]
    assert tally.counts == {"bad": 3, "worse": 3}
