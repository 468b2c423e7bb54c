"""Evaluation sets: ScienceQA's choices, with an image or none, by subject; OK-VQA's categories."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from mmcore.data import DataConfig, PairData
from mmcore.data.opening import open_data, open_held_out
from mmcore.data.sources.questions import NO_IMAGE
from mmcore.metrics.vqa import choice_of
from mmcore.tasks import vqa
from mmcore.tasks.subject import Subject
from tests.mmcore.data_fixtures import write_images, write_json, write_vqa

CHOICES = ["an apple", "a dog", "two dogs"]


def problem(split: str, answer: int, **more: Any) -> dict[str, Any]:
    found = {"question": "Which is it?", "choices": CHOICES, "answer": answer, "hint": "", "image": None, "task": "x"}
    return {**found, "grade": "grade2", "subject": "natural science", "split": split, "solution": "long"} | more


def problems(folder: Path) -> str:
    """As in problems.json: two with an image, one of which is to train on."""
    found = {
        "1": problem("train", 0, image="image.png"),
        "3": problem("train", 1),
        "2": problem("test", 1, image="image.png", hint="An animal."),
        "4": problem("test", 2, hint="More than one.", subject="social science", grade="grade11"),
        "7": problem("test", 0, subject="social science"),
        "8": problem("val", 0),
    }
    write_images(folder, ["train/1/image.png", "test/2/image.png"])
    return write_json(folder / "problems.json", found)


def test_science_qa_is_told_by_its_content_and_knows_what_is_to_test(tmp_path: Path) -> None:
    data = open_data(DataConfig(problems(tmp_path)), seed=0)
    assert data.questions is not None and data.val_questions is not None
    assert [q.question_id for q in data.questions.questions] == ["1", "3"] and data.num_train == 2
    first, second, third = data.val_questions.questions
    assert first.text == "Which is it?\nContext: An animal.\nOptions: (A) an apple (B) a dog (C) two dogs"
    assert (first.answers, first.choices, first.answer_type) == (("B",), tuple(CHOICES), "natural science")
    assert [q.groups for q in (first, second, third)] == [
        ("image", "grades 1-6"), ("text context", "grades 7-12"), ("no context", "grades 1-6"),
    ]  # fmt: skip
    images, _, broken = data.val_questions.read(range(3))
    assert images[0] is not NO_IMAGE and images[1] is images[2] is NO_IMAGE and not broken
    assert len({data.val_questions.image_id(i) for i in range(3)}) == 3
    held = open_held_out(DataConfig(problems(tmp_path)))
    assert held.val_questions is not None and len(held.val_questions) == 3


@pytest.mark.parametrize(("change", "reason"), [
    ({"answer": 3}, "answer is not the number of a choice"), ({"answer": "B"}, "answer is not the number of a choice"),
    ({"choices": ["one"]}, "choices are not 2 to 10 texts"), ({"choices": "ab"}, "choices are not 2 to 10 texts"),
    ({"image": 3}, "image is not text"), ({"question": " "}, "empty question"),
])  # fmt: skip
def test_a_bad_problem_is_named(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = write_json(tmp_path / "x.json", {"1": problem("test", 0), "2": problem("test", 0) | change})
    with pytest.raises(ValueError, match=reason):
        open_held_out(DataConfig(file))


@pytest.mark.parametrize(("said", "place"), [
    ("B", 1), ("b. a dog", 1), ("(C)", 2), ("The answer is A.", 0), ("answer: C", 2), ("a dog", 1), ("Two dogs!", 2),
    ("it is an apple", 0), ("a dog or an apple", None), ("D", None), ("", None), ("Because", None), ("A dog", 1),
    ("A dog runs", 1), ("the answer is a dog", 1), ("The answer is B because", 1), ("Answer: (C)", 2),
])  # fmt: skip
def test_a_choice_is_named_by_its_letter_or_its_text(said: str, place: int | None) -> None:
    assert choice_of(said, CHOICES) == place


class Says:
    """A recipe whose model says these texts in turn."""

    prompts: ClassVar = {"vqa": "{}"}

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = texts, []

    def pictures(self, data: PairData) -> PairData:
        return data

    def speaks(self, *_: Any) -> Any:
        def say(images: list[Image.Image], prompts: list[str]) -> list[str]:
            self.asked += prompts
            return [self.texts[i % len(self.texts)] for i in range(len(images))]

        return say


def measured(recipe: Says, data: PairData, folder: Path) -> None:
    run: Any = SimpleNamespace(folder=folder, recipe="says")
    vqa.report(Subject(recipe, None, None, data, torch.device("cpu"), run), vqa.Options(data="x"))


def test_science_qa_is_measured_by_subject_context_and_grade(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, recipe = open_held_out(DataConfig(problems(tmp_path))), Says("B", "The answer is A", "an apple")
    measured(recipe, data, tmp_path)
    said = capsys.readouterr().out
    assert "VQA accuracy (held-out), greedy, 3 questions: 66.7 % (majority 33.3 %)" in said
    for line in ("natural science 100.0", "social science 50.0", "image 100.0", "no context 100.0", "text context 0.0"):
        assert f"  {line} %" in said
    assert recipe.asked[0].endswith("Options: (A) an apple (B) a dog (C) two dogs")
    found = json.loads((tmp_path / "answers.json").read_text())
    assert [x["choice"] for x in found] == ["B", "A", "A"] and found[1]["answer"] == "The answer is A"


def test_ok_vqa_is_measured_by_its_categories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, file = write_vqa(tmp_path, 2, "val")
    answers = json.loads(Path(file).read_text())
    for number, annotation in enumerate(answers["annotations"]):
        annotation |= {"answer_type": "other", "question_type": ("one", "other")[number % 2], "confidence": 3}
        annotation["answers"] = [{**x, "raw_answer": f"{x['answer']}!"} for x in annotation["answers"]]
    answers["question_types"] = {"one": "Vehicles and Transportation", "other": "Other"}
    config = DataConfig(questions, annotations=write_json(Path(file), answers))
    measured(Says("yes"), open_held_out(config), tmp_path)
    said = capsys.readouterr().out
    assert "4 questions: 50.0 %" in said and "  Vehicles and Transportation" in said and "  Other" in said
