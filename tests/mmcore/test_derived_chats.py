"""Conversations derived from captions, classes and pixels: true, asked once, not to be answered blindly."""

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmcore.data.config import DataConfig
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, parse_conversation
from mmcore.data.sources.derived_chats import MAX_TURNS, digit_conversations, draw_named, stamp_conversations
from mmcore.data.sources.digits import DIGIT_NAMES, DIGIT_TEMPLATES, open_digits
from mmcore.data.sources.picture_facts import main_colour, proportions
from mmcore.data.sources.questions import QuestionSet
from mmcore.data.sources.stamps import Stamps, open_stamps
from tests.mmcore.data_fixtures import write_stamps

ASKED = {
    "en": {
        "what is in this image?": "caption",
        "which kind of thing is this?": "kind",
        "which colour is most of it, apart from white?": "colour",
        "is it wider than tall, or taller than wide?": "shape",
    },
    "zh_CN": {
        "这张图片里有什么？": "caption",
        "这是哪一类东西？": "kind",
        "除了白色，它大部分是什么颜色？": "colour",
        "它是宽大于高，还是高大于宽？": "shape",
    },
}
RIVALS = {"caption", "kind", "belongs"}


def questions(conversation: Conversation) -> dict[str, str]:
    """Answers by question."""
    turns = [(t.text.removeprefix(f"{IMAGE}\n"), t.role) for t in conversation.turns]
    return {asked: said for (asked, _), (said, role) in pairwise(turns) if role == "assistant"}


def named(conversation: Conversation, language: str) -> dict[str, tuple[str, str]]:
    """Questions and answers by what is asked."""
    return {ASKED[language].get(q, "belongs"): (q, a) for q, a in questions(conversation).items()}


def by_picture(found: ConversationSet, language: str) -> dict[str, list[dict[str, tuple[str, str]]]]:
    told = defaultdict(list)
    for conversation in found.conversations:
        assert conversation.images == (conversation.id,)
        told[conversation.id].append(named(conversation, language))
    return told


def as_record(conversation: Conversation) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[t.role], "value": t.text} for t in conversation.turns]
    return {"id": conversation.id, "image": list(conversation.images), "conversations": turns}


def test_conversations_about_digits_are_derived_true_and_of_1_to_3_turns() -> None:
    scans, _ = open_digits(0.2, 0)
    found, captions = digit_conversations(scans, seed=0), set()
    assert found.derived and "derived" in found.name and len(found) == len(scans)
    for digit, conversation in zip(scans.classes, found.conversations, strict=True):
        assert parse_conversation(0, as_record(conversation)).turns == conversation.turns
        name = DIGIT_NAMES[digit]
        for question, answer in questions(conversation).items():
            assert (("even", "odd")[digit % 2] if "even or odd" in question else name) in answer
            if ASKED["en"].get(question) == "caption":
                captions.add(answer.replace(name, "{}"))
    assert captions == {DIGIT_TEMPLATES[0]}
    assert {len(c.turns) // 2 for c in found.conversations} == set(range(1, MAX_TURNS + 1))
    assert found.raw_images(5)[0].tobytes() == scans.raw_image(5).tobytes()
    assert digit_conversations(scans, seed=0).conversations == found.conversations
    assert digit_conversations(scans, seed=1).conversations != found.conversations
    part = scans.take([40, 3])
    assert digit_conversations(part, seed=0).conversations == [found.conversations[i] for i in (40, 3)]


@pytest.fixture(params=["en", "zh_CN"])
def stamped(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Stamps, QuestionSet]:
    """A language, and what there is in it."""
    config = DataConfig(data="stamps", language=request.param, stamps_dir=write_stamps(tmp_path))
    data = open_stamps(config, 0)
    assert isinstance(data.source, Stamps) and data.questions is not None
    return request.param, data.source, data.questions


def test_conversations_about_stamps_are_derived_and_true(stamped: tuple[Any, Stamps, QuestionSet]) -> None:
    language, stamps, questions = stamped
    found = stamp_conversations(stamps, questions, language=language, seed=0)
    assert found.derived and "derived" in found.name
    told, said = by_picture(found, language), set()
    assert list(told) == stamps.identities
    for i, conversations in enumerate(told.values()):
        kind = questions.questions[i].answers[0]
        facts = {name: fact for conversation in conversations for name, fact in conversation.items()}
        assert facts["caption"][1] == stamps.texts[i] and facts["kind"][1] == kind
        assert facts["colour"][1] == {"en": "blue", "zh_CN": "蓝色"}[language]
        assert facts["shape"][1] == {"en": "about as wide as tall", "zh_CN": "宽和高差不多"}[language]
        question, answer = facts["belongs"]
        assert answer == {"en": ("no", "yes"), "zh_CN": ("不属于", "属于")}[language][kind in question]
        said.add(answer)
    assert len(said) == 2
    for conversation in found.conversations:
        assert parse_conversation(0, as_record(conversation)).turns == conversation.turns
    assert found.raw_images(0)[0].tobytes() == stamps.raw_image(0).tobytes()
    assert stamp_conversations(stamps, questions, language=language, seed=0) == found
    assert stamp_conversations(stamps, questions, language=language, seed=1) != found


def test_each_fact_about_a_stamp_is_asked_once_and_apart_from_what_gives_it_away(stamped: Any) -> None:
    language, stamps, questions = stamped
    found = stamp_conversations(stamps, questions, language=language, seed=0)
    lengths = set()
    for conversations in by_picture(found, language).values():
        counts = Counter(name for conversation in conversations for name in conversation)
        assert counts == dict.fromkeys(RIVALS | {"colour", "shape"}, 1)
        assert all(len(RIVALS & conversation.keys()) == 1 for conversation in conversations)
        lengths |= {len(conversation) for conversation in conversations}
    assert lengths == set(range(1, MAX_TURNS + 1))
    assert len({tuple(named(c, language)) for c in found.conversations}) > 6  # in any order


def test_a_stamp_is_asked_nothing_that_no_training_stamp_tells_or_that_nobody_knows(stamped: Any) -> None:
    language, stamps, questions = stamped

    def asked(questions: QuestionSet | None, **options: Any) -> set[str]:
        found = stamp_conversations(stamps, questions, language=language, seed=0, **options)
        return {name for conversation in found.conversations for name in named(conversation, language)}

    assert asked(questions, is_held_out=True) == {"kind", "belongs", "colour", "shape"}
    assert asked(None) == {"caption", "colour", "shape"} and asked(None, is_held_out=True) == {"colour", "shape"}
    options: Any = {"language": language, "seed": 0, "is_held_out": True, "captions_only": True}
    alone = stamp_conversations(stamps, questions, **options)
    assert [c.turns[1].text for c in alone.conversations] == stamps.texts


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


def drawn(*boxes: tuple[int, int, int, int, tuple[int, int, int]], size: int = 200) -> Image.Image:
    """Boxes of (left, top, right, bottom, colour) on white."""
    image = Image.new("RGB", (size, size), "white")
    for left, top, right, bottom, colour in boxes:
        image.paste(colour, (left, top, right, bottom))
    return image


@pytest.mark.parametrize(("width", "expected"), [(90, "red"), (70, None), (50, "blue")])
def test_a_colour_is_told_where_it_is_more_than_half_of_what_is_drawn(width: int, expected: str | None) -> None:
    red, blue, green = (220, 20, 20), (20, 40, 200), (30, 160, 40)
    boxes = [(0, 0, width, 100, red), (width, 0, 140, 100, blue), (0, 150, 60, 180, green)]
    assert main_colour(drawn(*boxes)) == expected


@pytest.mark.parametrize(("width", "height", "expected"), [
    (100, 100, "even"), (100, 90, "even"), (100, 82, None), (82, 100, None), (140, 100, "wide"), (100, 140, "tall"),
    (180, 6, "wide"),
])  # fmt: skip
def test_proportions_are_those_of_what_is_drawn_where_they_are_clear(width: int, height: int, expected: str | None):
    for left in (0, 13):
        assert proportions(drawn((left, 5, left + width, 5 + height, (30, 160, 40)))) == expected
    # the image's own
    assert proportions(Image.new("RGB", (width, height), "red")) == expected


def test_an_image_that_is_white_all_over_tells_nothing() -> None:
    noise = np.random.default_rng(0).integers(231, 256, (60, 50, 3), dtype=np.uint8)
    for image in (Image.new("RGB", (60, 50), "white"), Image.fromarray(noise)):
        assert main_colour(image) is None and proportions(image) is None
