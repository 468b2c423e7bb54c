"""Conversations about the built-in images, derived from their captions and classes: for a first try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.digits import Digits, digit_questions
from mmcore.data.questions import QuestionSet
from mmcore.data.sources import ImageSource
from mmcore.data.stamps import Stamps

MAX_TURNS = 3
"""Questions about one image; each conversation draws 1 to as many of them."""

_DERIVED = 0xC4A7
DESCRIBE = {"en": "what is in this image?", "zh_CN": "这张图片里有什么？"}
"""The question that a caption answers, by language."""
_BELONGS = {"en": "does it belong to {}?", "zh_CN": "它属于{}吗？"}
_YES_NO = {"en": ("yes", "no"), "zh_CN": ("属于", "不属于")}

Fact = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True, repr=False)
class SourcePictures:
    """Images of a source in random access, by their sample ids."""

    source: ImageSource
    index: dict[str, int]

    def named_image(self, name: str) -> Image.Image:
        """RGB image of this sample; raises BrokenRecord."""
        if name not in self.index:
            raise BrokenRecord("missing file")
        return self.source.raw_image(self.index[name])


def digit_conversations(scans: Digits, *, seed: int, captions_only: bool = False) -> ConversationSet:
    """A conversation about each scan: what it shows, which digit, and whether that is even.

    Args:
        scans: training or held-out scans.
        seed: of which questions are asked, in which order, and how a caption is worded.
        captions_only: nothing is asked but what it shows.
    """
    questions = digit_questions(scans).questions
    facts: list[list[Fact]] = []
    for i, number in enumerate(scans.numbers):
        caption = scans.caption(i, np.random.default_rng([seed, _DERIVED, number, 1]))
        asked = [(q.text, q.answers[0]) for q in questions[2 * i : 2 * i + 2]]
        facts.append([(DESCRIBE["en"], caption), *([] if captions_only else asked)])
    return _conversations("digits (derived conversations)", scans, facts, scans.numbers, seed)


def stamp_conversations(
    stamps: Stamps,
    questions: QuestionSet | None,
    *,
    language: str,
    seed: int,
    max_broken: float = 0.01,
    captions_only: bool = False,
) -> ConversationSet:
    """A conversation about each stamp: its caption, which kind of thing it is, and whether it is of a kind drawn.

    Args:
        stamps: training or held-out stamps.
        questions: the derived question of each stamp, or None where stamps have no classes: captions alone.
        language: of both.
        seed: of what is asked, and in which order.
        max_broken: share of broken images above which a run stops.
        captions_only: nothing is asked but what it shows.
    """
    facts: list[list[Fact]] = [[(DESCRIBE[language], text)] for text in stamps.texts]
    if questions is not None and not captions_only:
        kinds = [q.answers[0] for q in questions.questions]
        known = sorted(set(kinds))
        rng = np.random.default_rng([seed, _DERIVED])
        for asked, question, kind in zip(facts, questions.questions, kinds, strict=True):
            # Half of the answers are yes, or "no" would be right without a look.
            others = [other for other in known if other != kind] or known
            named = kind if rng.random() < 0.5 else others[int(rng.integers(len(others)))]
            is_right = _YES_NO[language][named != kind]
            asked += [(question.text, kind), (_BELONGS[language].format(named), is_right)]
    name = "stamps (derived conversations)"
    return _conversations(name, stamps, facts, range(len(stamps)), seed, max_broken)


def _conversations(
    name: str,
    source: Digits | Stamps,
    facts: Sequence[Sequence[Fact]],
    numbers: Sequence[int],
    seed: int,
    max_broken: float = 0.0,
) -> ConversationSet:
    """1 to `MAX_TURNS` of the facts about each image, drawn by its number and the seed."""
    conversations: list[Conversation] = []
    for i, (known, number) in enumerate(zip(facts, numbers, strict=True)):
        rng = np.random.default_rng([seed, _DERIVED, number])
        num_asked = int(rng.integers(1, min(MAX_TURNS, len(known)) + 1))
        turns: list[Turn] = []
        for place in rng.permutation(len(known))[:num_asked]:
            question, answer = known[place]
            turns.append(Turn("user", question if turns else f"{IMAGE}\n{question}"))
            turns.append(Turn("assistant", answer))
        image = source.sample_id(i)
        conversations.append(Conversation(image, (image,), tuple(turns)))
    pictures = SourcePictures(source, {source.sample_id(i): i for i in range(len(source))})
    return ConversationSet(name, pictures, conversations, True, max_broken)
