"""Answers as most data sets have them: one a question, often a letter of a choice."""

import pytest

from mmcore.metrics import exact_match, vqa_accuracy
from mmcore.tasks.talks import Reply


@pytest.mark.parametrize(("said", "wanted", "right"), [
    ("A", "A", True), ("a", "A", True), ("A.", "A", True), ("", "A", False), ("the", "A", False), ("B", "A", False),
    ("a dog", "dog", True), ("Two", "2", True), ("", "dog", False), ("an", "the", False), ("的", "的", True),
    ("+", "+", True), ("-", "+", False), ("", "+", False), ("?", "!", False), ("😀", "😀", True), ("", "", True),
])  # fmt: skip
def test_a_letter_of_a_choice_is_an_answer_of_its_own(said: str, wanted: str, right: bool) -> None:
    assert exact_match(said, wanted) == right
    assert Reply(0, "which?", said, wanted).is_right == right


def test_one_answer_a_question_is_right_where_it_is_said() -> None:
    assert vqa_accuracy(["a dog", "B", "no"], [["dog"], ["B"], ["yes"]]).overall == pytest.approx(2 / 3)
    assert vqa_accuracy(["", "A"], [["", "dog"], ["", "A"]]).overall == 0.5  # an answer left blank is none
    assert vqa_accuracy(["two", "cat"], [["2", "pair"], ["dog", "puppy"]]).overall == 0.5
    assert vqa_accuracy(["dog"], [["dog", "dog", "cat"]]).overall == pytest.approx((2 * 1 / 3 + 2 / 3) / 3)
