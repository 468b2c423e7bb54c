"""`open_data`: names, settings, the broken-record limit; splits without a leak by class, caption and image."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcore.data.broken import BrokenTally
from mmcore.data.sources.digits import DIGIT_NAMES, DIGIT_TEMPLATES, Digits
from mmcore.data.sources.split import split_pairs
from tests.mmcore.data_fixtures import fake_tokenizer, opened, spec, take, train_loader
from tests.refusals import refuses

NAN = float("nan")


@pytest.mark.parametrize(("config", "sentence"), [
    *(({"data": near}, f"got '{near}'; did you mean '{name}'")
      for near, name in {"digit": "digits", "Digits": "digits", "stamp": "stamps", "stmaps": "stamps",
                         "emojis": "emoji"}.items()),
    ({"data": "laion"}, r"data must be 'digits', 'scattered', 'stamps', 'emoji', tar shards .*, got 'laion'$"),
    *(({"data": data, name: value}, rf"{name}=.* has no effect on '{data}'")
      for data, name, value in (
          ("digits", "val_data", "x.csv"), ("digits", "language", "zh_CN"), ("digits", "num_samples", 5),
          ("digits", "style", "noto"), ("stamps", "style", "noto"), ("digits", "stamps_dir", "x"),
          ("digits", "annotations", "x.json"), ("stamps", "csv_separator", ","),
          ("stamps", "val_data", "x.csv"), ("x.csv", "num_samples", 5), ("x.csv", "image_root", "x"),
          ("x.tar", "csv_img_key", "img"), ("x.tar", "csv_caption_key", "text"), ("x.tar", "val_fraction", 0.5),
          ("x.tar", "val_annotations", "x.json"), ("x.json", "csv_separator", ","), ("x.json", "num_samples", 5))),
    ({"data": "x.csv", "val_data": "y.csv", "val_fraction": 0.5}, "val_fraction=0.5 has no effect beside val_data="),
    *(({"data": "x.tar", name: value}, f"data: {name} must be .*got {value}")
      for name, values in {"val_fraction": (1.0, -0.1, NAN), "max_broken": (1.1, -0.1, NAN), "num_samples": (0,),
                           "workers": (-1,)}.items() for value in values),
])  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(config: dict, sentence: str) -> None:
    refuses(sentence, opened, **config)


def test_a_negative_seed_is_refused() -> None:
    refuses("seed must be at least 0, got -1", opened, seed=-1)


def test_the_limit_has_slack_within_an_epoch_and_none_at_its_end() -> None:
    tally = BrokenTally(0.01, "x")
    tally.add(99, [("a", "bad")] * 50)
    tally.check(final=False)
    refuses(r"50 of 99 records of x are broken \(bad 50\); the first is a", tally.check, final=True)
    tally = BrokenTally(0.01, "x")
    tally.add(400, [(str(i), "bad") for i in range(10)])
    tally.check(final=False)
    refuses("10 of 400", tally.check, final=True)
    # 4 are allowed, and three times the square root of 4 on top.
    tally.add(0, [("11", "worse")])
    refuses(r"11 of 400 .* \(bad 10, worse 1\)", tally.check, final=False)
    tally.add(700)
    tally.check(final=True)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=4, max_size=60),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 5),
)
def test_no_image_and_no_caption_is_on_both_sides(pairs: list[tuple[int, int]], fraction: float, seed: int) -> None:
    images, captions = zip(*pairs, strict=True)
    try:
        train, val = split_pairs(images, captions, fraction, seed)
    except ValueError as error:
        assert "the smallest has" in str(error)
        return
    assert sorted(train + val) == list(range(len(pairs)))
    assert not {images[i] for i in train} & {images[i] for i in val}
    assert not {captions[i] for i in train} & {captions[i] for i in val}
    assert 1 <= len(val) <= max(1, round(fraction * len(pairs)))


def test_a_split_of_different_pairs_has_the_exact_share_and_follows_the_seed() -> None:
    train, val = split_pairs(range(100), range(100), 0.25, 0)
    assert (len(train), len(val)) == (75, 25) and split_pairs(range(100), range(100), 0.25, 0) == (train, val)
    assert split_pairs(range(100), range(100), 0.25, 1)[1] != val
    assert split_pairs(range(100), range(100), 0.0, 0) == (list(range(100)), [])


def test_a_chain_of_shared_images_and_captions_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"val_fraction=0.5 must leave room .* the smallest has 4 of 4 pairs"):
        split_pairs([0, 0, 1, 1], ["a", "b", "b", "c"], 0.5, 0)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_digits_are_split_within_each_class_and_disjoint(fraction: float) -> None:
    data = opened(val_fraction=fraction)
    assert data.val is not None and data.val.labels is not None
    train, val = data.source, data.val.source
    assert isinstance(train, Digits) and isinstance(val, Digits)
    assert sorted(train.numbers + val.numbers) == list(range(1797))
    whole, held_out = Counter(train.classes + val.classes), Counter(data.val.labels)
    assert held_out == {c: round(fraction * whole[c]) for c in range(10)} and data.class_names == DIGIT_NAMES
    assert data.templates == DIGIT_TEMPLATES


def test_digit_captions_name_the_class_and_vary_between_epochs() -> None:
    data = opened(val_fraction=0.0)
    assert data.num_train == 1797 and data.val is None
    assert set(data.captions()) == {t.format(n) for t in DIGIT_TEMPLATES for n in DIGIT_NAMES}
    seen: list[str] = []

    def tokenizer(captions: list[str]):
        seen.extend(captions)
        return fake_tokenizer(captions)

    loader = train_loader(data, spec(1797), tokenizer)
    first, second = take(loader, 2)
    for batch, captions in ((first, seen[:1797]), (second, seen[1797:])):
        assert all(DIGIT_NAMES[c] in text for c, text in zip(batch.labels.tolist(), captions, strict=True))
        share = Counter(text.replace(DIGIT_NAMES[c], "{}") for c, text in zip(batch.labels.tolist(), captions))
        # Four templates drawn 1,797 times: within 5 standard deviations (18) of 449.
        assert all(359 <= share[t] <= 539 for t in DIGIT_TEMPLATES)
    of = [dict(zip(b.ids, c, strict=True)) for b, c in ((first, seen[:1797]), (second, seen[1797:]))]
    assert of[0] != of[1]
