"""VQA accuracy: the values that the official tool gave (recorded with its commit), and properties."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.metrics import normalize_answer, vqa_accuracy

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "vqa.json").read_text("utf-8"))
QUESTIONS: list[dict[str, Any]] = GOLDEN["questions"]


@pytest.mark.parametrize("case", GOLDEN["normal"], ids=lambda case: repr(case["answer"][:30]))
def test_the_normal_form_is_the_official_one(case: dict[str, str]) -> None:
    assert normalize_answer(case["answer"]) == case["normal"]


@pytest.mark.parametrize(
    "case", QUESTIONS, ids=lambda case: f"{case['prediction']!r} of {len(case['answers'])}"
)
def test_the_accuracy_of_a_question_is_the_official_one(case: dict[str, Any]) -> None:
    got = vqa_accuracy([case["prediction"]], [case["answers"]])
    assert got.overall == pytest.approx(case["accuracy"], abs=1e-12)
    assert got.by_type == {}


def test_accuracies_overall_and_by_type_are_the_official_ones() -> None:
    got = vqa_accuracy(
        [q["prediction"] for q in QUESTIONS],
        [q["answers"] for q in QUESTIONS],
        types=[q["type"] for q in QUESTIONS],
    )
    assert got.overall == pytest.approx(GOLDEN["overall"], abs=1e-12)
    assert got.by_type == pytest.approx(GOLDEN["by_type"], abs=1e-12)


@given(
    people=st.lists(st.sampled_from("red blue Red 2 two".split()), min_size=1, max_size=14),
    prediction=st.text(),
)
@settings(max_examples=50)
def test_it_is_the_mean_over_people_left_out(people: list[str], prediction: str) -> None:
    for answer in (people[0], prediction):
        same = len(set(people)) == 1
        form = str.strip if same else normalize_answer
        agree = [form(answer.replace("\n", " ").replace("\t", " ")) == form(one) for one in people]
        scores = [min(1.0, sum(agree[:i] + agree[i + 1 :]) / 3) for i in range(len(people))]
        assert vqa_accuracy([answer], [people]).overall == pytest.approx(sum(scores) / len(people), abs=1e-12)


@pytest.mark.parametrize(
    ("predictions", "answers", "types", "message"),
    [
        ([], [], None, "predictions must hold at least one answer, got none"),
        ("yes", [["yes"]], None, "predictions must be lists of strings, got 'yes'"),
        ([1], [["1"]], None, "predictions must be lists of strings, got [1]"),
        (["yes"], [["yes"], ["no"]], None, "answers must be 1 lists, one a prediction, got 2"),
        (["yes"], [[]], None, "answers must hold at least one answer a question, got none"),
        (["yes"], ["yes"], None, "answers must be lists of strings, got 'yes'"),
        (["yes"], [[None]], None, "answers must be lists of strings, got [None]"),
        (["yes"], [["yes"]], ["a", "b"], "types must be 1 strings, got 2"),
        (["yes"], [["yes"]], [3], "types must be lists of strings, got [3]"),
    ],
)
def test_bad_arguments_are_refused_by_name(predictions: Any, answers: Any, types: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"vqa_accuracy: {message}")):
        vqa_accuracy(predictions, answers, types=types)
