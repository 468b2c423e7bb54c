"""The accuracy of visual question answering as the VQA challenge computes it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmcore.ops import require

# the right forms; the challenge's table has each without its apostrophe
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
# likewise with either one of its two apostrophes missing
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've
""".split()
_CONTRACTIONS = {word.replace("'", ""): word for word in _ONE_APOSTROPHE}
for _word in _TWO_APOSTROPHES:
    _start, _middle, _end = _word.split("'")
    _CONTRACTIONS |= {f"{_start}{_middle}'{_end}": _word, f"{_start}'{_middle}{_end}": _word}
# the table's irregular entries; its slip (somebodyd) is kept because scores depend on it
_CONTRACTIONS |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
_CONTRACTIONS |= {"somebody'd": "somebodyd", "yall'll": "y'all'll", "y'allll": "y'all'll"}
_CONTRACTIONS |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")

_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(n) for n, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_GROUPS = re.compile(r"[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
# the challenge hands a flag of that value to the argument that counts replacements
_MAX_PERIODS = 32


@dataclass(frozen=True)
class VQAAccuracy:
    """Mean accuracy in [0, 1] over all questions and, where types are given, over the questions of each type."""

    overall: float
    by_type: dict[str, float]


def normalize_answer(answer: str) -> str:
    """The challenge's normal form of an answer, words one space apart: lower case, digits, no articles, little
    punctuation.

    A mark of punctuation goes without trace if the answer has it beside a space or has a digit group ("1,000"), and
    becomes a space otherwise; a period stays before a digit; numbers up to ten become digits, "none" becomes 0;
    contractions get their apostrophes back.
    """
    text, out = answer, answer
    has_groups = _DIGIT_GROUPS.search(text) is not None
    for mark in _PUNCTUATION:
        vanishes = has_groups or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if vanishes else " ")
    out = _PERIOD.sub("", out, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


FEWEST = 3
"""Answers to a question of which one can be left out."""


def vqa_accuracy(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], *, types: Sequence[str] | None = None
) -> VQAAccuracy:
    """Mean over questions of the mean over people left out of min(1, n / 3), n the others who agree.

    Answers are compared in their normal form, except where all people wrote the same: there as they stand, as the
    challenge does. Leaving one out, a question with 3 answers scores at most 2 / 3. With fewer nobody can be left out:
    there an answer counts where it is one of them (`exact_match`) and not blank.

    Args:
        predictions: [N], one answer a question.
        answers: [N], people's answers to each question, at least one (ten in VQAv2).
        types: [N], the type of each question (or of its answer), for the accuracies by type.

    Returns:
        Accuracies in [0, 1], not rounded; the challenge's own tool prints percentages with two digits.

    Reference: vqaEval.py of github.com/GT-Vision-Lab/VQA. Paper: arXiv:1505.00468.
    """
    op, size = "vqa_accuracy", len(predictions)
    _check_strings("predictions", predictions)
    require(op, size > 0, "predictions must hold at least one answer, got none")
    require(op, len(answers) == size, "answers must be {} lists, one a prediction, got {}", size, len(answers))
    for people in answers:
        _check_strings("answers", people)
        require(op, len(people) > 0, "answers must hold at least one answer a question, got none")
    scores = [_score(prediction, people) for prediction, people in zip(predictions, answers)]
    by_type: dict[str, list[float]] = {}
    if types is not None:
        _check_strings("types", types)
        require(op, len(types) == size, "types must be {} strings, got {}", size, len(types))
        for kind, score in zip(types, scores):
            by_type.setdefault(kind, []).append(score)
    return VQAAccuracy(sum(scores) / len(scores), {kind: sum(of) / len(of) for kind, of in by_type.items()})


def exact_match(said: str, wanted: str) -> bool:
    """Whether two answers have the same normal form; where it drops everything, as the "A" of a choice, or "+",
    letters count, and without letters the marks."""
    return _form(said) == _form(wanted)


_SAID = re.compile(r"[Aa]nswer(?: is)?\s*:?\s*\(?([A-J])(?=[).,:]|\s*$|\s+because)")
_BEGINS = re.compile(r"\(?([A-J])(?:[).:]|$)")


def choice_of(said: str, choices: Sequence[str]) -> int | None:
    """Which of the choices, lettered A, B and so on, an answer names: by its text, by "the answer is B", by a letter
    that it begins with, or else as the only one whose text it has in it; None = none of them, or several."""
    same = [i for i, choice in enumerate(choices) if exact_match(said, choice)]
    if len(same) == 1:
        return same[0]
    letter = _SAID.search(said) or _BEGINS.match(said.strip())
    place = -1 if letter is None else ord(letter[1]) - ord("A")
    if 0 <= place < len(choices):
        return place
    form = f" {_form(said)} "
    named = [i for i, choice in enumerate(choices) if f" {_form(choice)} " in form]
    return named[0] if len(named) == 1 else None


def _form(text: str) -> str:
    return normalize_answer(text) or "".join(c for c in text.lower() if c.isalnum()) or text.strip()


def _score(prediction: str, people: Sequence[str]) -> float:
    if len(people) < FEWEST:
        return float(any(answer.strip() and exact_match(prediction, answer) for answer in people))
    prediction, *people = (x.replace("\n", " ").replace("\t", " ").strip() for x in (prediction, *people))
    if len(set(people)) > 1:
        prediction, *people = map(normalize_answer, (prediction, *people))
    agree = people.count(prediction)
    left_out_agrees, left_out_differs = min(1, (agree - 1) / 3), min(1, agree / 3)
    return (agree * left_out_agrees + (len(people) - agree) * left_out_differs) / len(people)


def _check_strings(name: str, values: Sequence[str]) -> None:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    are_strings = listed and all(isinstance(value, str) for value in values)
    require("vqa_accuracy", are_strings, "{} must be lists of strings, got {!r}", name, values)
