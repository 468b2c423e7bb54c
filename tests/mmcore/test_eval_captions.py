"""BLEU, CIDEr and VQA accuracy: what the original tools gave (recorded with their versions), and properties."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.metrics import bleu, caption_tokens, cider, normalize_answer, vqa_accuracy
from tests.refusals import refuses

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text("utf-8"))
WORDS = "a the red dog cat man's can't runs sits 5 st. t-shirt".split()
CAPTIONS = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
CORPORA = st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=4)), min_size=1, max_size=6)


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda case: case["caption"][:30])
def test_tokens_are_those_of_the_original_tokenizer(case: dict[str, Any]) -> None:
    assert caption_tokens(case["caption"]) == case["tokens"]


@pytest.mark.parametrize("case", GOLDEN["corpora"], ids=lambda case: case["name"])
def test_scores_are_those_of_the_original_scorers(case: dict[str, Any]) -> None:
    scores = bleu(case["candidates"], case["references"])
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"]
    assert list(scores.values()) == pytest.approx(case["bleu"], rel=1e-9, abs=1e-12)
    assert cider(case["candidates"], case["references"]) == pytest.approx(case["cider"], rel=1e-9, abs=1e-12)


@given(caption=CAPTIONS)
def test_case_and_final_punctuation_do_not_count(caption: str) -> None:
    assert caption_tokens(f'"{caption.upper()}" .') == caption_tokens(caption)


@given(corpus=CORPORA)
@settings(max_examples=50)
def test_scores_do_not_depend_on_the_order_of_images_and_references(corpus: list[tuple[str, list[str]]]) -> None:
    candidates, people = zip(*corpus)
    reversed_people = [reference[::-1] for reference in people[::-1]]
    assert bleu(candidates[::-1], reversed_people) == pytest.approx(bleu(candidates, people))
    score = cider(candidates, people)
    assert cider(candidates[::-1], reversed_people) == pytest.approx(score) and -1e-9 <= score <= 10 + 1e-9


@pytest.mark.parametrize("score", [bleu, cider], ids=["bleu", "cider"])
@pytest.mark.parametrize(("candidates", "references", "message"), [
    ([], [], "candidates must be at least one string in a list, got []"),
    ("a cat", [["a cat"]], "candidates must be at least one string in a list, got 'a cat'"),
    (["a cat", None], [["a"], ["a"]], "candidates must be at least one string in a list, got ['a cat', None]"),
    (None, [["a cat"]], "candidates must be at least one string in a list, got None"),
    (["a cat"], [["a cat"], ["a dog"]], "references must be 1 lists, one a candidate, got 2"),
    (["a cat", "a dog"], [["a cat"], []], "references must be at least one string in a list, got []"),
    (["a cat"], ["a cat"], "references must be at least one string in a list, got 'a cat'"),
    (["a cat"], [[5]], "references must be at least one string in a list, got [5]"),
])  # fmt: skip
def test_a_bad_corpus_is_refused_by_name(score: Any, candidates: Any, references: Any, message: str) -> None:
    refuses(re.escape(f"{score.__name__}: {message}"), score, candidates, references)


OFFICIAL: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "vqa.json").read_text("utf-8"))
# of fewer answers than three none can be left out: see tests/faults/test_answers.py
QUESTIONS: list[dict[str, Any]] = [q for q in OFFICIAL["questions"] if len(q["answers"]) >= 3]


@pytest.mark.parametrize("case", OFFICIAL["normal"], ids=lambda case: repr(case["answer"][:30]))
def test_the_normal_form_is_the_official_one(case: dict[str, str]) -> None:
    assert normalize_answer(case["answer"]) == case["normal"]


@pytest.mark.parametrize("case", QUESTIONS, ids=lambda case: f"{case['prediction']!r} of {len(case['answers'])}")
def test_the_accuracy_of_a_question_is_the_official_one(case: dict[str, Any]) -> None:
    got = vqa_accuracy([case["prediction"]], [case["answers"]])
    assert got.overall == pytest.approx(case["accuracy"], abs=1e-12) and got.by_type == {}


def test_accuracies_overall_and_by_type_are_the_official_ones() -> None:
    predictions, answers, types = ([q[key] for q in QUESTIONS] for key in ("prediction", "answers", "type"))
    got = vqa_accuracy(predictions, answers, types=types)
    official: dict[str, list[float]] = {}
    for question in QUESTIONS:
        official.setdefault(question["type"], []).append(question["accuracy"])
    assert got.overall == pytest.approx(np.mean([q["accuracy"] for q in QUESTIONS]), abs=1e-12)
    assert got.by_type == pytest.approx({kind: np.mean(found) for kind, found in official.items()}, abs=1e-12)


@given(people=st.lists(st.sampled_from("red blue Red 2 two".split()), min_size=3, max_size=14), prediction=st.text())
@settings(max_examples=50)
def test_it_is_the_mean_over_people_left_out(people: list[str], prediction: str) -> None:
    for answer in (people[0], prediction):
        same = len(set(people)) == 1
        form = str.strip if same else normalize_answer
        agree = [form(answer.replace("\n", " ").replace("\t", " ")) == form(one) for one in people]
        scores = [min(1.0, sum(agree[:i] + agree[i + 1 :]) / 3) for i in range(len(people))]
        assert vqa_accuracy([answer], [people]).overall == pytest.approx(sum(scores) / len(people), abs=1e-12)


@pytest.mark.parametrize(("predictions", "answers", "types", "message"), [
    ([], [], None, "predictions must hold at least one answer, got none"),
    ("yes", [["yes"]], None, "predictions must be lists of strings, got 'yes'"),
    ([1], [["1"]], None, "predictions must be lists of strings, got [1]"),
    (["yes"], [["yes"], ["no"]], None, "answers must be 1 lists, one a prediction, got 2"),
    (["yes"], [[]], None, "answers must hold at least one answer a question, got none"),
    (["yes"], ["yes"], None, "answers must be lists of strings, got 'yes'"),
    (["yes"], [[None]], None, "answers must be lists of strings, got [None]"),
    (["yes"], [["yes"]], ["a", "b"], "types must be 1 strings, got 2"),
    (["yes"], [["yes"]], [3], "types must be lists of strings, got [3]"),
])  # fmt: skip
def test_bad_arguments_are_refused_by_name(predictions: Any, answers: Any, types: Any, message: str) -> None:
    refuses(re.escape(f"vqa_accuracy: {message}"), vqa_accuracy, predictions, answers, types=types)
