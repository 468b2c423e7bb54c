"""Conversations about the built-in images, derived from captions, classes and pixels: for a first try."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.base import EvalSet, ImageSource, PairSource
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.sources.digits import DIGIT_NAMES, DIGIT_TEMPLATES, Digits, digit_questions
from mmcore.data.sources.emoji import Emoji
from mmcore.data.sources.picture_facts import COLOURS, main_colour, proportions
from mmcore.data.sources.questions import QuestionSet
from mmcore.data.sources.stamps import Stamps

MAX_TURNS = 3
"""Questions of one conversation, at most."""

_DERIVED = 0xC4A7
DESCRIBE = {"en": "what is in this image?", "zh_CN": "这张图片里有什么？"}
"""The question that a caption answers, by language."""
_BELONGS = {"en": "does it belong to {}?", "zh_CN": "它属于{}吗？"}
_YES_NO = {"en": ("yes", "no"), "zh_CN": ("属于", "不属于")}
_WHICH_COLOUR = {"en": "which colour is most of it, apart from white?", "zh_CN": "除了白色，它大部分是什么颜色？"}
_COLOURS = {"zh_CN": dict(zip(COLOURS, "黑色 灰色 棕色 红色 橙色 黄色 绿色 蓝色 紫色".split(), strict=True))}
_WHICH_SHAPE = {"en": "is it wider than tall, or taller than wide?", "zh_CN": "它是宽大于高，还是高大于宽？"}
_SHAPES = {
    "en": {"wide": "wider than tall", "tall": "taller than wide", "even": "about as wide as tall"},
    "zh_CN": {"wide": "宽大于高", "tall": "高大于宽", "even": "宽和高差不多"},
}

Fact = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True, repr=False)
class SourcePictures:
    """Images of a source in random access, by their sample ids."""

    source: ImageSource
    index: dict[str, int]

    def named_image(self, name: str, least: int | None = None) -> Image.Image:
        BrokenRecord.unless(name in self.index, "missing file")
        return self.source.raw_image(self.index[name], least)


def described_conversations(val: EvalSet) -> ConversationSet:
    """A conversation for each caption, which answers what the image shows."""
    names = [val.source.sample_id(i) for i in val.indices]
    of_images = zip(names, val.captions, strict=True)
    conversations = [_conversation(name, [(DESCRIBE["en"], text)]) for name, texts in of_images for text in texts]
    pictures = SourcePictures(val.source, dict(zip(names, val.indices, strict=True)))
    return ConversationSet("captions", pictures, conversations, False, val.max_broken)


def asked_conversations(questions: QuestionSet) -> ConversationSet:
    """A conversation for each question, with the answer that most annotators gave."""
    asked = [(q.text, Counter(a for a in q.answers if a.strip()).most_common(1)[0][0]) for q in questions.questions]
    conversations = [_conversation(questions.sample_id(i), [fact]) for i, fact in enumerate(asked)]
    return _set(questions.name, questions, conversations, questions.max_broken, derived=questions.derived)


def digit_conversations(scans: Digits, *, seed: int, captions_only: bool = False) -> ConversationSet:
    """A conversation about each scan, of 1 to `MAX_TURNS` of: what it shows, which digit, and whether that is even;
    `seed` decides which, and in which order. With `captions_only`, only what it shows is asked."""
    questions = digit_questions(scans).questions
    conversations: list[Conversation] = []
    for i, number in enumerate(scans.numbers):
        # in one wording of the captions: no picture tells which of them is wanted
        facts = [(DESCRIBE["en"], DIGIT_TEMPLATES[0].format(DIGIT_NAMES[scans.classes[i]]))]
        if not captions_only:
            facts += [(q.text, q.answers[0]) for q in questions[2 * i : 2 * i + 2]]
        rng = np.random.default_rng([seed, _DERIVED, number])
        num_asked = int(rng.integers(1, len(facts) + 1))
        asked = [facts[place] for place in rng.permutation(len(facts))[:num_asked]]
        conversations.append(_conversation(scans.sample_id(i), asked))
    return _set("digits (derived conversations)", scans, conversations)


def emoji_conversations(
    emoji: Any, questions: QuestionSet | None, *, seed: int, captions_only: bool = False
) -> ConversationSet:
    """Two conversations about each emoji: what it shows, answered by its first name, and up to `MAX_TURNS` of its
    derived questions, which a name would answer, by `seed`; with `captions_only`, the first alone."""
    assert isinstance(emoji, Emoji) and questions is not None
    facts: dict[int, list[Fact]] = defaultdict(list)
    for i, question in enumerate(questions.questions):
        facts[questions.image_id(i)].append((question.text, question.answers[0]))
    conversations: list[Conversation] = []
    for i in range(len(emoji)):
        conversations.append(_conversation(emoji.sample_id(i), [(DESCRIBE["en"], emoji.names[i][0])]))
        if not captions_only:
            of_one, rng = facts[emoji.image_id(i)], np.random.default_rng([seed, _DERIVED, i])
            asked = [of_one[place] for place in rng.permutation(len(of_one))[:MAX_TURNS]]
            conversations.append(_conversation(emoji.sample_id(i), asked))
    return _set("emoji (derived conversations)", emoji, conversations)


def stamp_conversations(
    stamps: Stamps,
    questions: QuestionSet | None,
    *,
    language: str,
    seed: int,
    max_broken: float = 0.01,
    captions_only: bool = False,
    is_held_out: bool = False,
) -> ConversationSet:
    """Conversations about each stamp: its caption, which kind of thing it is, whether it is of a kind drawn, which
    colour it has and whether it is wide or tall, each asked once.

    The first three give each other away and are asked in different conversations.

    Args:
        stamps: training or held-out stamps.
        questions: the derived question of each stamp, or None where stamps have no classes.
        language: of both.
        seed: of what is asked, and in which order.
        max_broken: share of broken images above which a run stops.
        captions_only: nothing is asked but what it shows.
        is_held_out: what it shows is not asked beside the rest: no held-out caption is one of a training stamp, so
            none can be told word by word.
    """
    described: list[Fact] = [(DESCRIBE[language], text) for text in stamps.texts]
    kinds = [] if questions is None else _kinds(questions, language, np.random.default_rng([seed, _DERIVED]))
    conversations: list[Conversation] = []
    for i, description in enumerate(described):
        if captions_only:
            dealt = [[description]]
        else:
            rivals = [*([] if is_held_out else [description]), *(kinds[i] if kinds else [])]
            dealt = _dealt(rivals, _seen(stamps, i, language), np.random.default_rng([seed, _DERIVED, i]))
        conversations += [_conversation(stamps.sample_id(i), asked) for asked in dealt]
    return _set("stamps (derived conversations)", stamps, conversations, max_broken)


def _kinds(questions: QuestionSet, language: str, rng: np.random.Generator) -> list[list[Fact]]:
    """Of each stamp, which kind of thing it is, and whether it is of a kind drawn."""
    kinds = [question.answers[0] for question in questions.questions]
    found: list[list[Fact]] = []
    for question, kind, named in zip(questions.questions, kinds, draw_named(kinds, rng), strict=True):
        answer = _YES_NO[language][named != kind]
        found.append([(question.text, kind), (_BELONGS[language].format(named), answer)])
    return found


def draw_named(kinds: Sequence[str], rng: np.random.Generator) -> list[str]:
    """A kind to ask about for each of `kinds`, so that nobody can answer by the kind that is named alone.

    About half of each kind are asked about their own; the others are dealt each other's kinds, so each kind is named
    as often where it is wrong as where it is right, as far as one of more than half of them allows.
    """
    others = sorted(rng.permutation(len(kinds)).tolist(), key=kinds.__getitem__)[1::2]
    named = list(kinds)
    dealt = [others[i] for i in rng.permutation(len(others))]
    for place, i in enumerate(others):
        if kinds[dealt[place]] != kinds[i]:
            continue
        for swap in rng.permutation(len(others)):
            j = others[swap]
            if kinds[dealt[swap]] != kinds[i] and kinds[dealt[place]] != kinds[j]:
                dealt[place], dealt[swap] = dealt[swap], dealt[place]
                break
    for i, giver in zip(others, dealt, strict=True):
        named[i] = kinds[giver]
    return named


def _seen(stamps: Stamps, i: int, language: str) -> list[Fact]:
    """What the pixels of a stamp tell, where they tell it clearly."""
    try:
        image = stamps.raw_image(i)
    except BrokenRecord:  # whoever reads it for training or evaluation counts it
        return []
    colour, shape = main_colour(image), proportions(image)
    found: list[Fact] = []
    if colour is not None:
        found.append((_WHICH_COLOUR[language], _COLOURS.get(language, {}).get(colour, colour)))
    if shape is not None:
        found.append((_WHICH_SHAPE[language], _SHAPES[language][shape]))
    return found


def _dealt(rivals: Sequence[Fact], others: Sequence[Fact], rng: np.random.Generator) -> list[list[Fact]]:
    """Each fact in one of the conversations, in random order: one for each rival, the others drawn to them."""
    dealt: list[list[Fact]] = [[rival] for rival in rivals] or [[] for _ in others[:1]]
    for fact in others:
        dealt[int(rng.integers(len(dealt)))].append(fact)
    assert all(len(facts) <= MAX_TURNS for facts in dealt)
    return [[facts[place] for place in rng.permutation(len(facts))] for facts in dealt]


def _conversation(image: str, facts: Sequence[Fact]) -> Conversation:
    turns: list[Turn] = []
    for question, answer in facts:
        turns.append(Turn("user", question if turns else f"{IMAGE}\n{question}"))
        turns.append(Turn("assistant", answer))
    return Conversation(image, (image,), tuple(turns))


def _set(
    name: str, source: PairSource, conversations: list[Conversation], max_broken: float = 0.0, *, derived: bool = True
) -> ConversationSet:
    pictures = SourcePictures(source, {source.sample_id(i): i for i in range(len(source))})
    return ConversationSet(name, pictures, conversations, derived, max_broken)
