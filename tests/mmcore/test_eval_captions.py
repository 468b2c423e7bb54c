"""Tokens, BLEU and CIDEr: the values that the original tools gave (recorded with their versions), and properties."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.metrics import bleu, caption_tokens, cider

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


@given(caption=st.text(max_size=40))
def test_a_token_is_lower_case_and_holds_no_space(caption: str) -> None:
    for token in caption_tokens(caption):
        assert token and token == token.lower() and token.split() == [token]


@given(caption=CAPTIONS)
def test_case_and_final_punctuation_do_not_count(caption: str) -> None:
    assert caption_tokens(f'"{caption.upper()}" .') == caption_tokens(caption)


@given(corpus=CORPORA)
@settings(max_examples=50)
def test_a_candidate_equal_to_a_reference_has_bleu_1(corpus: list[tuple[str, list[str]]]) -> None:
    people = [[f"a big dog sits {first}", *rest] for first, rest in corpus]
    scores = bleu([first for first, *_ in people], people)
    # the smoothing of 1e-9 a count, in four precisions
    assert list(scores.values()) == pytest.approx([1.0] * 4, abs=1e-8)


@given(corpus=CORPORA)
@settings(max_examples=50)
def test_scores_do_not_depend_on_the_order_of_images_and_references(
    corpus: list[tuple[str, list[str]]],
) -> None:
    candidates, people = zip(*corpus)
    reversed_people = [reference[::-1] for reference in people[::-1]]
    assert bleu(candidates[::-1], reversed_people) == pytest.approx(bleu(candidates, people))
    score = cider(candidates, people)
    assert cider(candidates[::-1], reversed_people) == pytest.approx(score)
    assert -1e-9 <= score <= 10 + 1e-9


def test_cider_is_10_where_every_image_has_one_reference_of_its_own_words_and_the_candidate_repeats_it() -> (
    None
):
    captions = ["one red dog runs", "two blue cats sleep"]
    assert cider(captions, [[caption] for caption in captions]) == pytest.approx(10)


def test_cider_counts_repeated_words_no_more_often_than_the_reference() -> None:
    people = [["one red dog runs"], ["two blue cats sleep"]]
    assert cider(["one red dog dog dog dog", people[1][0]], people) < cider(
        ["one red dog", people[1][0]], people
    )


@pytest.mark.parametrize("score", [bleu, cider], ids=["bleu", "cider"])
@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "candidates must be at least one string in a list, got []"),
        ("a cat", [["a cat"]], "candidates must be at least one string in a list, got 'a cat'"),
        (
            ["a cat", None],
            [["a cat"], ["a cat"]],
            "candidates must be at least one string in a list, got ['a cat', None]",
        ),
        (None, [["a cat"]], "candidates must be at least one string in a list, got None"),
        (["a cat"], [["a cat"], ["a dog"]], "references must be 1 lists, one a candidate, got 2"),
        (["a cat", "a dog"], [["a cat"], []], "references must be at least one string in a list, got []"),
        (["a cat"], ["a cat"], "references must be at least one string in a list, got 'a cat'"),
        (["a cat"], [[5]], "references must be at least one string in a list, got [5]"),
    ],
)
def test_a_bad_corpus_is_refused_by_name(score: Any, candidates: Any, references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{score.__name__}: {message}")):
        score(candidates, references)
