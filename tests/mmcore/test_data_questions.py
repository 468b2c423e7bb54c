"""Questions: VQAv2's and LAVIS's files, derived ones of the built-in data, training and evaluation batches."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.data import PairData, Preprocess, Question, QuestionSet
from mmcore.data.sources.digits import DIGIT_NAMES, Digits
from tests.mmcore.data_fixtures import (
    fake_tokenizer,
    opened,
    opened_json,
    opened_kind,
    question_loader,
    spec,
    take,
    train_loader,
    write_images,
    write_json,
    write_vqa,
)
from tests.refusals import refuses


def _sets(data: PairData) -> tuple[QuestionSet, QuestionSet]:
    assert data.questions is not None and data.val_questions is not None
    return data.questions, data.val_questions


@pytest.mark.parametrize("kind", ["digits", "stamps", "vqa", "lavis questions"])
def test_no_image_is_asked_about_on_both_sides(kind: str, tmp_path: Path) -> None:
    train, val = _sets(opened_kind(kind, tmp_path, val_fraction=0.3))
    of_side = [{s.image_id(i) for i in range(len(s))} for s in (train, val)]
    assert len(of_side[0]) > len(of_side[1]) > 0 and not of_side[0] & of_side[1]


def test_vqa_questions_meet_their_answers_and_their_images(tmp_path: Path) -> None:
    data = opened_kind("vqa", tmp_path, val_fraction=0.0)
    assert data.source is None and data.val is None and data.val_questions is None and data.num_train == 24
    assert data.questions is not None and not data.questions.derived
    first, second = data.questions.questions[6:8]
    assert first == Question(30, "How many?", ("3",) * 7 + ("many",) * 3, "how", "number")
    assert second == Question(31, "Is it?", ("yes",) * 10, "is", "yes/no")
    batch = next(question_loader(data, spec(24), fake_tokenizer))
    assert batch.questions is not None and torch.equal(batch.tokens, fake_tokenizer(batch.captions))
    of_image: dict[int, list[str]] = {}
    for name, question, answer, image_id in zip(
        batch.ids, batch.questions, batch.captions, batch.image_ids.tolist(), strict=True
    ):
        path, question_id = name.split(", question ")
        assert path.endswith(f"train2014/COCO_train2014_{int(question_id) // 10:012d}.jpg")
        assert answer in ({"yes"} if question == "Is it?" else {str(int(question_id) // 10), "many"})
        of_image.setdefault(image_id, []).append(path)
    assert len(of_image) == 12 and all(len(paths) == 2 and len(set(paths)) == 1 for paths in of_image.values())


def test_answers_are_drawn_by_the_annotators_counts_and_anew_in_each_epoch(tmp_path: Path) -> None:
    loader = question_loader(opened_kind("vqa", tmp_path, val_fraction=0.0), spec(24, image_size=1), None)
    drawn: list[dict[str, str]] = []
    for batch in take(loader, 60):
        triples = zip(batch.ids, batch.questions, batch.captions, strict=True)
        drawn.append({name: answer for name, question, answer in triples if question == "How many?"})
    num_many = sum(answer == "many" for answers in drawn for answer in answers.values())
    # 3 of 10 annotators, 720 draws: within 5 standard deviations (12.3) of 216.
    assert 155 <= num_many <= 277 and drawn[0] != drawn[1]


def test_blank_answers_count_for_evaluation_and_are_never_drawn(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    records = [{"image": "a.jpg", "question": "q?", "answer": ["", "x", " "], "question_id": i} for i in range(20)]
    data = opened_json(tmp_path / "x.json", records)
    assert data.questions is not None and data.questions.questions[0].answers == ("", "x", " ")
    assert set(next(question_loader(data, spec(20), None)).captions) == {"x"}
    assert data.questions.all_captions(0) == ["x"]


def test_held_out_questions_come_in_order_without_those_of_broken_images(tmp_path: Path) -> None:
    train, val = write_vqa(tmp_path, 4), write_vqa(tmp_path, 5, "val", first=20)
    (tmp_path / "val2014" / f"COCO_val2014_{22:012d}.jpg").write_bytes(b"GIF?")
    files: dict[str, Any] = {"annotations": train[1], "val_data": val[0], "val_annotations": val[1]}
    _, held_out = _sets(opened(train[0], **files, max_broken=0.5))
    batches = list(held_out.batches(3, Preprocess(8)))
    assert [len(images) for images, _ in batches] == [3, 1, 3, 1] and batches[0][0].shape == (3, 3, 8, 8)
    asked = [question.question_id for _, questions in batches for question in questions]
    assert asked == [10 * i + k for i in (20, 21, 23, 24) for k in (0, 1)]
    assert all(len(q.answers) == 10 and q.question_type in ("how", "is") for _, qs in batches for q in qs)
    assert held_out.broken == {"not an image": 2}
    plain = torch.stack([images[0] for images, _ in held_out.batches(1, Preprocess(8))])
    assert torch.equal(plain, torch.cat([images for images, _ in batches]))
    held_out.max_broken = 0.1
    message = r"2 of 10 records of the images of .*val_questions.json are broken"
    refuses(message, lambda: list(held_out.batches(3, Preprocess(8))))


def test_lavis_questions_have_one_answer_or_several_and_a_number_for_a_missing_id(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    records = [
        {"image": "a.jpg", "question": " q? ", "answer": "one", "question_id": "vg_1", "dataset": "vg"},
        {"image": "b.jpg", "question": "q?", "answer": ["one", "two", "two"], "image_id": 5},
        {"image": "a.jpg", "question": "r?", "answer": ["x"], "question_id": 12},
    ]
    found = opened_json(tmp_path / "x.json", records).questions
    assert found is not None
    several = Question(1, "q?", ("one", "two", "two"))
    assert found.questions == [Question("vg_1", "q?", ("one",)), several, Question(12, "r?", ("x",))]
    assert found.image_id(0) == found.image_id(2) != found.image_id(1)


def test_questions_of_digits_are_derived_from_the_class_and_say_so() -> None:
    train, val = _sets(opened("digits"))
    which, parity = "which digit is written here?", "is this digit even or odd?"
    for questions in (train, val):
        assert questions.derived and "derived" in questions.name and isinstance(questions.source, Digits)
        assert len(questions) == 2 * len(set(questions.source.numbers))
        for question, digit in zip(questions.questions, questions.source.classes, strict=True):
            wanted = DIGIT_NAMES[digit] if question.text == which else ("even", "odd")[digit % 2]
            assert question.answers == (wanted,) * 10
    assert Counter(q.text for q in val.questions) == {which: len(val) // 2, parity: len(val) // 2}
    assert len({q.question_id for q in (*train.questions, *val.questions)}) == 2 * 1797


@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_questions_of_stamps_are_derived_from_the_folder_and_say_so(language: str, tmp_path: Path) -> None:
    data = opened_kind("stamps", tmp_path, language=language)
    names = {"en": ("animals", "food"), "zh_CN": ("动物", "食物")}[language]
    for questions in _sets(data):
        assert questions.derived and "derived" in questions.name
        for i, question in enumerate(questions.questions):
            folder = questions.source.sample_id(i).split("/")[0]
            assert question.answers == (names[folder == "food"],) * 10
    batch = next(question_loader(data, spec(4), None))
    assert set(batch.captions) <= set(names)


def test_captions_and_questions_are_not_taken_for_each_other(tmp_path: Path) -> None:
    vqa, message = (
        opened_kind("vqa", tmp_path),
        "questions.json' must have captions to train on, but has questions alone",
    )
    refuses(message, vqa.captions)
    refuses(message, train_loader, vqa, spec(2), None)
    for kind in ("csv", "shards"):
        data = opened_kind(kind, tmp_path)
        refuses("must have questions to train on, but has captions alone", question_loader, data, spec(2), None)


@pytest.mark.parametrize(("question", "annotation", "reason"), [
    ({"question": ""}, {}, "empty question"), ({"question": None}, {}, "no question"),
    ({"image_id": "x"}, {}, "image_id is not a number"), ({"image_id": "9" * 5000}, {}, "image_id is not a number"),
    ({"image_id": -4}, {}, "image_id is not a number"), ({"question_id": 99}, {}, "question without annotation"),
    ({"question_id": []}, {}, "question without annotation"),
    ({}, {"question_id": 99}, "question without annotation"), ({}, {"answers": []}, "no answer"),
    ({}, {"answers": [{"answer": " "}]}, "no answer"), ({}, {"answers": "yes"}, None),
    ({}, {"answers": [{"answer": "yes"}, {"answer": 3}]}, "answer is not text"),
    ({}, {"answers": [{"answer": "yes"}, {"answer": "\udc00"}]}, "answer is not text"),
    ({}, {"question_type": 4}, None),
])  # fmt: skip
def test_a_bad_question_is_counted_and_left_out(question: dict, annotation: dict, reason: str | None, tmp_path: Path):
    paths = [Path(path) for path in write_vqa(tmp_path, 3)]
    questions, annotations = (json.loads(path.read_text()) for path in paths)
    questions["questions"][1].update(question)
    next(a for a in annotations["annotations"] if a["question_id"] == 1).update(annotation)
    for path, content in zip(paths, (questions, annotations), strict=True):
        write_json(path, content)
    read = partial(opened, paths[0], annotations=str(paths[1]), val_fraction=0.0)
    data = read(max_broken=0.2)
    assert data.num_train == (6 if reason is None else 5) and data.broken == ({} if reason is None else {reason: 1})
    if reason is not None:
        refuses(rf"1 of 6 records of data='.*' are broken \({reason} 1\)", read)


@pytest.mark.parametrize("name", ["{:012d}.jpg", "abstract_v002_train2015_{:012d}.png", "{}.PNG", "img-{:06d}.webp"])
def test_images_are_found_by_number_under_any_prefix_and_width(name: str, tmp_path: Path) -> None:
    questions, annotations = write_vqa(tmp_path, 3, first=99)
    root = tmp_path / "other"
    write_images(root, [name.format(i) for i in range(95, 110)])
    (root / "notes.txt").write_text("")
    train = opened(questions, annotations=annotations, image_root=str(root), val_fraction=0.0).questions
    assert train is not None
    assert [train.source.sample_id(2 * i) for i in range(3)] == [str(root / name.format(99 + i)) for i in range(3)]


def test_mistakes_with_vqa_files_are_told_in_one_sentence(tmp_path: Path) -> None:
    questions, annotations = write_vqa(tmp_path, 4)
    lavis = write_json(tmp_path / "lavis.json", [{"image": "a.jpg", "question": "q", "answer": ["x"]}])
    other = write_json(tmp_path / "other.json", json.loads(Path(questions).read_text()))
    empty, twice = tmp_path / "empty", tmp_path / "elsewhere/twice"
    empty.mkdir()
    write_images(twice, ["1.jpg", "COCO_1.jpg"])
    refuses("holds VQAv2's questions, so annotations must be given", opened, questions)
    refuses("data='.*' holds VQAv2's annotations: give VQAv2's questions there", opened, annotations)
    both = partial(opened, questions, annotations=annotations)
    message = "annotations='.*' must hold VQAv2's annotations, but holds VQAv2 q"
    refuses(message, opened, questions, annotations=questions)
    refuses("annotations must be an existing file, got 'no.json'", opened, questions, annotations="no.json")
    message = "annotations=.* has no effect on data=.* LAVIS questions"
    refuses(message, opened, lavis, annotations=annotations)
    refuses("val_data='.*' holds VQAv2's questions, so val_annotations must be", both, val_data=questions)
    message = "such as COCO_train2014_000000000000.jpg, but .*empty has none of 4"
    refuses(message, both, image_root=str(empty))
    message = "image_root must hold one image of each number, got .*twice/1.jpg and .*twice/COCO_1.jpg"
    refuses(message, both, image_root=str(twice))
    nothing = write_json(tmp_path / "t.json", {"questions": [{"question_id": 1}]})
    refuses("must hold LAVIS's", opened, nothing)
    message = "val_data must not share images with data, got 4 in both"
    refuses(message, both, val_data=other, val_annotations=annotations)
