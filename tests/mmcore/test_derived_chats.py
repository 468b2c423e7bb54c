"""Conversations derived from captions, classes and pixels: true, asked once, and not to be answered blindly."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcore.data.broken import BrokenRecord
from mmcore.data.config import DataConfig
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, parse_conversation
from mmcore.data.sources.derived_chats import MAX_TURNS, digit_conversations, draw_named, stamp_conversations
from mmcore.data.sources.digits import DIGIT_NAMES, DIGIT_TEMPLATES, open_digits
from mmcore.data.sources.stamps import OpenStamps, Stamps, open_stamps
from tests.mmcore.data_fixtures import write_stamps

ASKED = {
    "en": {
        "caption": "what is in this image?",
        "kind": "which kind of thing is this?",
        "colour": "which colour is most of it, apart from white?",
        "shape": "is it wider than tall, or taller than wide?",
    },
    "zh_CN": {
        "caption": "这张图片里有什么？",
        "kind": "这是哪一类东西？",
        "colour": "除了白色，它大部分是什么颜色？",
        "shape": "它是宽大于高，还是高大于宽？",
    },
}
RIVALS = {"caption", "kind", "belongs"}


def questions(conversation: Conversation) -> dict[str, str]:
    """Answers by question."""
    turns = [(t.text.removeprefix(f"{IMAGE}\n"), t.role) for t in conversation.turns]
    return {asked: said for (asked, _), (said, role) in pairwise(turns) if role == "assistant"}


def named(conversation: Conversation, language: str) -> dict[str, tuple[str, str]]:
    """Questions and answers by what is asked."""
    names = {text: name for name, text in ASKED[language].items()}
    return {names.get(q, "belongs"): (q, a) for q, a in questions(conversation).items()}


def by_picture(found: ConversationSet, language: str) -> dict[str, list[dict[str, tuple[str, str]]]]:
    told = defaultdict(list)
    for conversation in found.conversations:
        assert conversation.images == (conversation.id,)
        told[conversation.id].append(named(conversation, language))
    return told


def opened(folder: Path, language: Any) -> OpenStamps:
    return open_stamps(DataConfig(data="stamps", language=language, stamps_dir=write_stamps(folder)), 0)


def as_record(conversation: Conversation) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[t.role], "value": t.text} for t in conversation.turns]
    return {"id": conversation.id, "image": list(conversation.images), "conversations": turns}


def test_conversations_about_digits_are_derived_true_and_of_1_to_3_turns() -> None:
    scans, _ = open_digits(0.2, 0)
    found = digit_conversations(scans, seed=0)
    assert found.derived and "derived" in found.name and len(found) == len(scans)
    captions = set()
    for i, conversation in enumerate(found.conversations):
        assert parse_conversation(0, as_record(conversation)).turns == conversation.turns
        for question, answer in questions(conversation).items():
            name = DIGIT_NAMES[scans.classes[i]]
            want = ("even", "odd")[scans.classes[i] % 2] if "even or odd" in question else name
            assert want in answer
            if question == ASKED["en"]["caption"]:
                captions.add(answer.replace(name, "{}"))
    assert captions == {DIGIT_TEMPLATES[0]}
    lengths = [len(c.turns) // 2 for c in found.conversations]
    assert set(lengths) == set(range(1, MAX_TURNS + 1))
    assert found.raw_images(5)[0].tobytes() == scans.raw_image(5).tobytes()
    assert digit_conversations(scans, seed=0).conversations == found.conversations
    assert digit_conversations(scans, seed=1).conversations != found.conversations
    part = scans.take([40, 3])
    assert digit_conversations(part, seed=0).conversations == [found.conversations[i] for i in (40, 3)]


@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_conversations_about_stamps_are_derived_and_true(tmp_path: Path, language: Any) -> None:
    stamps = opened(tmp_path / "s", language)
    assert stamps.questions is not None
    found = stamp_conversations(stamps.train, stamps.questions, language=language, seed=0)
    assert found.derived and "derived" in found.name
    told, said = by_picture(found, language), set()
    assert list(told) == stamps.train.identities
    for i, conversations in enumerate(told.values()):
        kind = stamps.questions.questions[i].answers[0]
        facts = {name: fact for conversation in conversations for name, fact in conversation.items()}
        assert facts["caption"][1] == stamps.train.texts[i]
        assert facts["kind"][1] == kind
        assert facts["colour"][1] == {"en": "blue", "zh_CN": "蓝色"}[language]
        assert facts["shape"][1] == {"en": "about as wide as tall", "zh_CN": "宽和高差不多"}[language]
        question, answer = facts["belongs"]
        assert answer == {"en": ("no", "yes"), "zh_CN": ("不属于", "属于")}[language][kind in question]
        said.add(answer)
    assert len(said) == 2
    for conversation in found.conversations:
        assert parse_conversation(0, as_record(conversation)).turns == conversation.turns
    assert found.raw_images(0)[0].tobytes() == stamps.train.raw_image(0).tobytes()
    assert stamp_conversations(stamps.train, stamps.questions, language=language, seed=0) == found
    assert stamp_conversations(stamps.train, stamps.questions, language=language, seed=1) != found


def test_each_fact_about_a_stamp_is_asked_once_and_apart_from_what_gives_it_away(tmp_path: Path) -> None:
    stamps = opened(tmp_path / "s", "en")
    found = stamp_conversations(stamps.train, stamps.questions, language="en", seed=0)
    lengths = set()
    for conversations in by_picture(found, "en").values():
        counts = Counter(name for conversation in conversations for name in conversation)
        assert counts == dict.fromkeys(RIVALS | {"colour", "shape"}, 1)
        assert all(len(RIVALS & conversation.keys()) == 1 for conversation in conversations)
        lengths |= {len(conversation) for conversation in conversations}
    assert lengths == set(range(1, MAX_TURNS + 1))
    assert len({tuple(named(c, "en")) for c in found.conversations}) > 6  # in any order


def test_a_held_out_stamp_is_asked_nothing_that_no_training_stamp_tells(tmp_path: Path) -> None:
    stamps = opened(tmp_path / "s", "en")
    options: Any = {"language": "en", "seed": 0, "is_held_out": True}
    found = stamp_conversations(stamps.train, stamps.questions, **options)
    asked = {name for c in found.conversations for name in named(c, "en")}
    assert asked == {"kind", "belongs", "colour", "shape"}
    alone = stamp_conversations(stamps.train, stamps.questions, captions_only=True, **options)
    assert [c.turns[1].text for c in alone.conversations] == stamps.train.texts


def test_stamps_without_classes_are_asked_for_captions_and_what_is_seen(tmp_path: Path) -> None:
    stamps = opened(tmp_path / "s", "en").train
    found = stamp_conversations(stamps, None, language="en", seed=0)
    assert all(set(named(c, "en")) == {"caption", "colour", "shape"} for c in found.conversations)
    held_out = stamp_conversations(stamps, None, language="en", seed=0, is_held_out=True)
    assert len(held_out) == len(stamps)
    assert all(set(named(c, "en")) == {"colour", "shape"} for c in held_out.conversations)


@pytest.mark.parametrize("seed", range(4))
def test_a_kind_is_named_as_often_where_it_is_wrong_as_where_it_is_right(seed: int) -> None:
    counts = {"symbols": 195, "animals": 119, "town": 66, "food": 55, "people": 3, "forces": 2, "sport": 1}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    asked = draw_named(kinds, np.random.default_rng(seed))
    right = Counter(kind for kind, name in zip(kinds, asked, strict=True) if kind == name)
    wrong = Counter(name for kind, name in zip(kinds, asked, strict=True) if kind != name)
    for kind, count in counts.items():
        assert right[kind] + wrong[kind] == count and abs(right[kind] - wrong[kind]) <= 1
    of_symbols = {name for kind, name in zip(kinds, asked, strict=True) if kind == "symbols"}
    assert of_symbols >= {"symbols", "animals", "town", "food"}


def test_kinds_of_which_one_is_more_than_half_are_named_too() -> None:
    assert draw_named(["a"] * 5, np.random.default_rng(0)) == ["a"] * 5
    assert sorted(draw_named(["a"] * 9 + ["b"] * 2, np.random.default_rng(0))) == ["a"] * 9 + ["b"] * 2
    assert draw_named([], np.random.default_rng(0)) == []


def test_a_derived_image_that_is_not_there_is_broken(tmp_path: Path) -> None:
    stamps = Stamps([str(tmp_path / "gone.png")], ["gone.png"], ["A thing."])
    found = stamp_conversations(stamps, None, language="en", seed=0)
    assert [len(c.turns) for c in found.conversations] == [2]
    with pytest.raises(BrokenRecord, match="missing file"):
        found.raw_images(0)
