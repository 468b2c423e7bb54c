"""The JSON files that captions and questions come in, told apart by their content."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmcore.data.broken import BrokenRecord
from mmcore.data.sources.base import parse_image_id
from mmcore.data.sources.questions import Question
from mmcore.ops import require

JsonFormat = Literal[
    "LAVIS captions", "LAVIS questions", "COCO captions", "VQAv2 questions", "VQAv2 annotations", "ScienceQA questions"
]

# the keys of the first records of its parts, or of the file where it is a list itself
_FORMATS: dict[JsonFormat, dict[str, set[str]]] = {
    "ScienceQA questions": {"": {"question", "choices", "answer"}},
    "LAVIS questions": {"": {"image", "question", "answer"}},
    "LAVIS captions": {"": {"image", "caption"}},
    "VQAv2 questions": {"questions": {"question", "image_id", "question_id"}},
    "VQAv2 annotations": {"annotations": {"question_id", "answers"}},
    "COCO captions": {"annotations": {"image_id", "caption"}, "images": {"id", "file_name"}},
}
_KNOWN = frozenset(
    "images annotations questions id file_name image image_id caption question question_id answer answers "
    "question_type answer_type question_types choices hint subject grade split".split()
)
# of OK-VQA, whose annotations name its categories so
_CATEGORIES = frozenset("one two three four five six seven eight nine ten other".split())
LETTERS = "ABCDEFGHIJ"
"""Of the choices of a question, in their order."""
_NUM_PROBED = 100
_NUM_SHOWN = 8
_MAX_DIGITS = 18
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Shrink:
    """Makes of each JSON object, as it is parsed, what we keep of it: known keys, equal texts stored once.

    An annotator's answer, an object of four entries, becomes its text: VQAv2 has 4.4 million of them.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.dropped: dict[str, None] = {}
        """Unknown keys of the first objects, for messages."""
        self.num_seen = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> Any:
        # the questions of ScienceQA are by their numbers
        kept = {
            key: self._share(value)
            for key, value in pairs
            if key in _KNOWN or key in _CATEGORIES or (isinstance(value, dict) and key.isdecimal())
        }
        if self.num_seen < _NUM_PROBED:
            self.num_seen += 1
            self.dropped.update(dict.fromkeys(key for key, _ in pairs if key not in _KNOWN))
        if "answer" in kept and "question" not in kept and "image" not in kept:
            return kept["answer"]
        return kept

    def _share(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.texts.setdefault(value, value)
        if isinstance(value, list) and value and isinstance(value[0], str):
            return [self._share(item) for item in value]
        return value


@dataclass(frozen=True)
class JsonFile:
    """A JSON file whose format is known: `argument` is the setting that named it, `content` what is parsed of it, less
    what no format needs."""

    path: str
    argument: str
    format: JsonFormat
    content: Any

    @property
    def what(self) -> str:
        """The setting and its value, for messages."""
        return f"{self.argument}={self.path!r}"


@dataclass(frozen=True, slots=True)
class Record:
    """A caption or a question with its image."""

    image: (
        str | int | None
    )  # name of the image's file, or its number where the format gives no name; None = there is none
    image_id: str | None  # the image's identity, or None where the file gives none
    text: str | Question  # the caption, or the question with its answers
    split: str = ""  # that its file puts it into


def read_json(path: str, argument: str) -> JsonFile:
    """Parse a file once and tell its format; raises ValueError, naming `argument`, for no such file, no JSON, or no
    format that fits."""
    require("data", Path(path).is_file(), "{} must be an existing file, got {!r}", argument, path)
    shrink = _Shrink()
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=shrink)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {argument}={path!r} must be JSON in UTF-8, got: {error}") from None
    found = _recognise(content)
    if found is None:
        known = "LAVIS's captions [{image, caption}] or questions [{image, question, answer}], COCO's captions "
        known += (
            "{images, annotations}, VQAv2's questions {questions} or ScienceQA's {number: {question, choices, answer}}"
        )
        raise ValueError(f"data: {argument}={path!r} must hold {known}, got {_describe(content, [*shrink.dropped])}")
    return JsonFile(path, argument, found, content)


def _recognise(content: Any) -> JsonFormat | None:
    parts = content if isinstance(content, dict) else {"": content}
    if parts and all(name.isdecimal() for name in parts):
        parts = {"": list(parts.values())}
    for format, wanted in _FORMATS.items():
        if all(keys <= _keys(parts.get(part)) for part, keys in wanted.items()):
            return format
    return None


def _keys(records: Any) -> set[str]:
    """Keys of the first records of a list; none for anything else."""
    if not isinstance(records, list):
        return set()
    return {key for record in records[:_NUM_PROBED] if isinstance(record, dict) for key in record}


def _describe(content: Any, dropped: list[str]) -> str:
    """What a file of no known format holds, in a few words."""
    if isinstance(content, list):
        if not content:
            return "an empty list"
        keys = [*sorted(_keys(content)), *dropped]
        return f"a list with the keys {keys[:_NUM_SHOWN]}" if keys else f"a list of {type(content[0]).__name__}"
    if isinstance(content, dict):
        return f"an object with the keys {[*content, *dropped][:_NUM_SHOWN]}"
    return type(content).__name__


def records(file: JsonFile, answers: JsonFile | None) -> tuple[Iterable[Any], Callable[[int, Any], Record]]:
    """The undigested records of a file in order, and what makes a `Record` of the n-th or raises BrokenRecord.

    Args:
        file: captions or questions; an image with five captions gives five records.
        answers: VQAv2's annotations where `file` holds VQAv2's questions.
    """
    content = file.content
    if file.format == "COCO captions":
        names = {str(i["id"]): i.get("file_name") for i in content["images"] if _has_id(i, "id")}
        return content["annotations"], partial(_coco_caption, names)
    if file.format == "LAVIS captions":
        return _single_captions(content), partial(_lavis, True)
    if file.format == "LAVIS questions":
        return content, partial(_lavis, False)
    if file.format == "ScienceQA questions":
        named = content.items() if isinstance(content, dict) else enumerate(content)
        return named, _science_question
    assert answers is not None
    by_question = {a["question_id"]: a for a in answers.content["annotations"] if _has_id(a, "question_id")}
    types = answers.content.get("question_types")
    return content["questions"], partial(_vqa_question, by_question, types if isinstance(types, dict) else {})


def _single_captions(content: list[Any]) -> Iterator[Any]:
    for record in content:
        captions = record.get("caption") if isinstance(record, dict) else None
        if isinstance(captions, list) and captions:
            yield from ({**record, "caption": caption} for caption in captions)
        else:
            yield record


def _lavis(is_caption: bool, number: int, record: Any) -> Record:
    entries = _entries(record)
    image, image_id = _text(entries, "image"), parse_image_id(entries.get("image_id"))
    if is_caption:
        return Record(image, image_id, _text(entries, "caption"))
    question_id = entries["question_id"] if _has_id(entries, "question_id") else number
    question = Question(question_id, _text(entries, "question"), _answers(entries.get("answer")))
    return Record(image, image_id, question)


def _coco_caption(names: dict[str, Any], number: int, record: Any) -> Record:
    entries = _entries(record)
    image_id = parse_image_id(entries.get("image_id"))
    if image_id not in names:
        raise BrokenRecord("image_id is not among the images")
    return Record(_text({"file_name": names[image_id]}, "file_name"), image_id, _text(entries, "caption"))


def _vqa_question(answers: dict[Any, dict[str, Any]], names: dict[str, Any], number: int, record: Any) -> Record:
    entries = _entries(record)
    image_id = parse_image_id(entries.get("image_id"))
    if image_id is None or not image_id.isdecimal() or len(image_id) > _MAX_DIGITS:
        raise BrokenRecord("image_id is not a number")
    is_answered = _has_id(entries, "question_id") and entries["question_id"] in answers
    BrokenRecord.unless(is_answered, "question without annotation")
    annotation = answers[entries["question_id"]]
    types = (v if isinstance(v := annotation.get(k), str) else None for k in ("question_type", "answer_type"))
    kind, answer_type = types
    name = names.get(kind or "")  # OK-VQA's category, whose answers are all of one type
    text, given = _text(entries, "question"), _answers(annotation.get("answers"))
    question = Question(entries["question_id"], text, given, kind, name if isinstance(name, str) else answer_type)
    return Record(int(image_id), image_id, question)


def _science_question(number: int, named: tuple[str | int, Any]) -> Record:
    """Of ScienceQA's problems.json, whose images lie in a folder of the split and the number."""
    name, record = named
    entries = _entries(record)
    choices, right, image = (entries.get(key) for key in ("choices", "answer", "image"))
    are_texts = isinstance(choices, list) and all(isinstance(x, str) and x.strip() and is_unicode(x) for x in choices)
    BrokenRecord.unless(are_texts and 2 <= len(choices or ()) <= len(LETTERS), "choices are not 2 to 10 texts")
    assert isinstance(choices, list)
    is_place = isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(choices)
    BrokenRecord.unless(is_place, "answer is not the number of a choice")
    assert isinstance(right, int)
    BrokenRecord.unless(image is None or isinstance(image, str), "image is not text")
    hint, subject, grade, split = ((x if isinstance(x := entries.get(k), str) else "") for k in _OF_SCIENCE)
    text = _text(entries, "question") + (f"\nContext: {hint.strip()}" if hint.strip() else "")
    listed = " ".join(f"({letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))
    level = re.fullmatch(r"grade(\d+)", grade)
    groups = ["image" if image else "text context" if hint.strip() else "no context"]
    groups += [] if level is None else ["grades 1-6" if int(level[1]) <= 6 else "grades 7-12"]
    question = Question(
        entries["question_id"] if _has_id(entries, "question_id") else name,
        f"{text}\nOptions: {listed}",
        (LETTERS[right],),
        answer_type=subject or None,
        choices=tuple(x.strip() for x in choices),
        groups=tuple(groups),
        has_image=bool(image),
    )
    place = f"{split}/{name}/{image}" if isinstance(named[0], str) and split else image
    return Record(place or None, None if image else f"no image {name}", question, split)


_OF_SCIENCE = ("hint", "subject", "grade", "split")


def _entries(record: Any) -> dict[str, Any]:
    BrokenRecord.unless(isinstance(record, dict), "record is not an object")
    return record


def _has_id(record: Any, key: str) -> bool:
    value = record.get(key) if isinstance(record, dict) else None
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _text(entries: dict[str, Any], key: str) -> str:
    """The entry as stripped text; raises BrokenRecord where there is none."""
    value: Any = entries.get(key)
    BrokenRecord.unless(value is not None, f"no {key}")
    BrokenRecord.unless(isinstance(value, str) and is_unicode(value), f"{key} is not text")
    BrokenRecord.unless(bool(value.strip()), f"empty {key}")
    return value.strip()


def _answers(value: Any) -> tuple[str, ...]:
    """All answers to a question, at least one of which is not blank; a single text is one answer."""
    answers = [value] if isinstance(value, str) else value
    is_answered = isinstance(answers, list) and any(isinstance(a, str) and a.strip() for a in answers)
    BrokenRecord.unless(is_answered, "no answer")
    BrokenRecord.unless(all(isinstance(a, str) and is_unicode(a) for a in answers), "answer is not text")
    return tuple(answers)


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    return text.isascii() or _SURROGATE.search(text) is None
