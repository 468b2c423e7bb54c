"""Captions in JSON files: formats by content, images found, image_ids, splits without a leak, mistakes."""

import json
import logging
from pathlib import Path

import pytest
import torch

from mmcore.data import Preprocess
from tests.mmcore.data_fixtures import (
    opened,
    opened_json,
    spec,
    train_loader,
    write_coco,
    write_images,
    write_json,
    write_lavis,
    write_pairs,
    write_vqa,
)
from tests.refusals import refuses


def _image_ids(data, num: int) -> dict[str, int]:
    """Image_id of each caption."""
    batch = next(train_loader(data, spec(num), None))
    return dict(zip(batch.captions, batch.image_ids.tolist(), strict=True))


def test_lavis_captions_are_one_or_several_and_image_ids_text_or_numbers(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "sub/b.png", "c.jpg", "d.jpg"])
    records = [
        {"image": "a.jpg", "caption": " one ", "image_id": "coco_1"},
        {"image": "a.jpg", "caption": "two", "image_id": "coco_1"},
        {"image": "sub/b.png", "caption": ["three", "four"], "image_id": 7},
        {"image": "c.jpg", "caption": ["five", "six"]},
        {"image": "d.jpg", "caption": "seven", "image_id": "7"},
        {"image": "c.jpg", "caption": "eight", "image_id": None},
    ]
    data = opened_json(tmp_path / "x.json", records)
    assert list(data.captions()) == "one two three four five six seven eight".split()
    ids = _image_ids(data, 8)
    groups = [{"one", "two"}, {"three", "four", "seven"}, {"five", "six", "eight"}]
    assert all(len({ids[c] for c in group}) == 1 for group in groups) and len(set(ids.values())) == 3


def test_coco_captions_of_an_image_share_its_id_and_are_told_from_those_of_others(tmp_path: Path) -> None:
    data = opened(write_coco(tmp_path, 4, captions_each=3), val_fraction=0.0)
    assert data.num_train == 12
    batch = next(train_loader(data, spec(12), None))
    numbers = torch.tensor([int(c.split()[1].strip(",")) for c in batch.captions])
    same = batch.image_ids[:, None] == batch.image_ids[None]
    assert torch.equal(same, numbers[:, None] == numbers[None])
    assert all(f"/{n}.jpg" in name for n, name in zip(numbers.tolist(), batch.ids, strict=True))
    assert torch.equal(batch.labels[:, None] == batch.labels[None], torch.eye(12, dtype=torch.bool))


def test_image_ids_do_not_depend_on_where_the_images_lie(tmp_path: Path) -> None:
    found = []
    for place in ("a", "b"):
        data = opened(write_lavis(tmp_path / place, 5), val_fraction=0.0)
        found.append(_image_ids(data, 5))
    assert found[0] == found[1]


@pytest.mark.parametrize(("record", "reason"), [
    ({"image": "a.jpg"}, "no caption"), ({"image": "a.jpg", "caption": []}, "caption is not text"),
    ({"image": "a.jpg", "caption": " "}, "empty caption"),
    ({"image": "a.jpg", "caption": ["good", ""]}, "empty caption"),
    ({"image": "a.jpg", "caption": 3}, "caption is not text"),
    ({"image": "a.jpg", "caption": "\ud800"}, "caption is not text"), ({"caption": "x"}, "no image"),
    ({"image": ["a.jpg"], "caption": "x"}, "image is not text"), ({"image": "", "caption": "x"}, "empty image"),
    ({"image": "a.jpg", "caption": "x", "image_id": 1.5}, "image_id is neither text nor a whole number"),
    ({"image": "a.jpg", "caption": "x", "image_id": True}, "image_id is neither text nor a whole number"),
    ("a.jpg", "record is not an object"),
])  # fmt: skip
def test_a_bad_record_is_counted_logged_and_left_out(record: object, reason: str, tmp_path: Path, caplog):
    write_images(tmp_path, ["a.jpg"])
    records = [*({"image": "a.jpg", "caption": f"good {i}"} for i in range(4)), record]
    with caplog.at_level(logging.WARNING, "mmcore.data"):
        data = opened_json(tmp_path / "x.json", records, max_broken=0.2)
    number = 5 if "good" in str(record) else 4
    assert caplog.messages == [f"skipped x.json, caption {number}: {reason}"]
    assert set(data.captions()) == {f"good {i}" for i in range(4)} | ({"good"} if number == 5 else set())
    assert train_loader(data, spec(2), None).broken == {reason: 1}
    message = rf"1 of . records of data=.* are broken \({reason} 1\)"
    refuses(message, opened, tmp_path / "x.json", val_fraction=0.0, max_broken=0.1)


@pytest.mark.parametrize(("annotation", "reason"), [
    ({"image_id": 9, "caption": "x"}, "image_id is not among the images"),
    ({"image_id": 1, "caption": "x"}, "no file_name"),
    ({"image_id": None, "caption": "x"}, "image_id is not among the images"),
    ({"image_id": {}, "caption": "x"}, "image_id is neither text nor a whole number"),
    ({"image_id": 0}, "no caption"),
])  # fmt: skip
def test_a_bad_annotation_of_coco_is_counted(annotation: dict, reason: str, tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    images = [{"id": 0, "file_name": "a.jpg"}, {"id": 1}, {"id": []}, "odd"]
    annotations = [*({"image_id": 0, "caption": f"good {i}"} for i in range(3)), annotation]
    data = opened_json(tmp_path / "x.json", {"images": images, "annotations": annotations}, max_broken=1)
    assert data.num_train == 3 and data.broken == {reason: 1}


def test_a_name_that_no_file_can_have_is_a_broken_image(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    records = [{"image": name, "caption": "x"} for name in ("a.jpg", "a.jpg", "a.jpg", "a\0.jpg")]
    loader = train_loader(opened_json(tmp_path / "x.json", records, max_broken=0.5), spec(4), None)
    next(loader)
    assert loader.broken == {"unreadable file": 1}


@pytest.mark.parametrize(("content", "got"), [
    *((raw, "must be JSON in UTF-8, got: ") for raw in (b"", b"[{]", b"\xff\xfe[]", b"[" * 200_000)),
    ([], "got an empty list"), ([1, 2], "got a list of int"), (3, "got int"),
    ([{"img": "a.jpg", "caption": "x"}], r"got a list with the keys \['caption'"),
    ({"foo": 1, "bar": 2}, r"got an object with the keys \['foo', 'bar'\]"),
    ({"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "bbox": []}]}, "got an object"),
    ({"questions": []}, "got an object with the keys"),
])  # fmt: skip
def test_a_file_of_no_known_format_says_what_it_holds(content: object, got: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    known = "" if isinstance(content, bytes) else "must hold LAVIS's captions .* COCO's .* VQAv2's .*"
    refuses(rf"data='.*x.json' {known}{got}", opened, tmp_path / "x.json")


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = Path(write_lavis(tmp_path, 3))
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert opened(path, val_fraction=0.0).num_train == 3


def test_other_mistakes_are_told_in_one_sentence(tmp_path: Path) -> None:
    coco, (questions, annotations), empty = write_coco(tmp_path, 5), write_vqa(tmp_path, 4), tmp_path / "empty"
    empty.mkdir()
    refuses("data must be an existing file, got 'no.json'", opened, "no.json")
    refuses("val_data must be an existing file, got 'no.json'", opened, coco, val_data="no.json")
    refuses("image_root must be an existing folder, got 'nowhere'", opened, coco, image_root="nowhere")
    refuses("image_root must be the folder .* none of 5 tried .*0.jpg$", opened, coco, image_root=str(empty))
    refuses("annotations='.*' has no effect on .* COCO captions", opened, coco, annotations=annotations)
    refuses("val_annotations='.*' has no effect without val_data", opened, coco, val_annotations=annotations)
    refuses("val_data must not share images with data, got 5 in both", opened, coco, val_data=coco)
    message = "val_data must hold captions as data does, but '.*' holds questions"
    refuses(message, opened, coco, val_data=questions, val_annotations=annotations)
    refuses("at least 2 training", opened, write_json(tmp_path / "one.json", [{"image": "0.jpg", "caption": "x"}]))
    broken = write_json(tmp_path / "broken.json", [{"image": "", "caption": "x"}])
    refuses("must hold at least one caption, got none", opened, broken, max_broken=1.0)


def test_images_are_found_in_the_root_or_in_a_folder_right_below_it(tmp_path: Path) -> None:
    write_images(tmp_path, ["images/train2014/a.jpg", "images/val2014/b.jpg", "images/val2014/a2.jpg"])
    records = [{"image": "b.jpg", "caption": "x"}, {"image": "a2.jpg", "caption": "y"}]
    wanted = {str(tmp_path / "images/val2014" / name) for name in ("b.jpg", "a2.jpg")}
    for root in ("images", "images/val2014"):
        data = opened_json(tmp_path / "x.json", records, image_root=str(tmp_path / root))
        assert set(next(train_loader(data, spec(2), None)).ids) == wanted
    absolute = [{"image": str(tmp_path / "images/train2014/a.jpg"), "caption": c} for c in "xy"]
    assert opened_json(tmp_path / "x.json", absolute).num_train == 2


def test_a_split_leaves_no_image_and_no_caption_on_both_sides(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.jpg" for i in range(30)])
    records = [{"image": f"{i}.jpg", "caption": [f"c{i}", f"d{i // 2}"], "image_id": i // 3} for i in range(30)]
    for seed in range(5):
        data = opened(write_json(tmp_path / "x.json", records), val_fraction=0.3, seed=seed)
        assert data.val is not None and len(data.val.captions) < 10
        held_out = {c for captions in data.val.captions for c in captions}
        train = set(data.captions())
        assert len(held_out) + len(train) == 45 and not held_out & train
        # Images 3n to 3n + 2 are one, by image_id; captions d join 2n and 2n + 1.
        assert not {int(c[1:]) // 3 for c in held_out if c[0] == "c"} & {int(c[1:]) // 3 for c in train if c[0] == "c"}


def test_a_held_out_file_gives_each_image_with_all_of_its_captions(tmp_path: Path) -> None:
    train, val = write_coco(tmp_path, 4), write_coco(tmp_path, 3, captions_each=2, first=10)
    data = opened(train, val_data=val)
    assert data.num_train == 4 and data.val is not None
    assert data.val.captions == [[f"thing {i}, said {turn} times" for turn in (0, 1)] for i in (10, 11, 12)]
    assert [i for _, indices in data.val.batches(2, Preprocess(8)) for i in indices.tolist()] == [0, 1, 2]
    assert data.questions is None and data.val_questions is None


def test_a_linked_folder_does_not_hide_that_images_are_shared(tmp_path: Path) -> None:
    train = write_lavis(tmp_path / "a", 4)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    val = write_json(tmp_path / "val.json", [{"image": "b/val2014/COCO_val2014_000000000002.jpg", "caption": "x"}])
    with pytest.raises(ValueError, match="val_data must not share images with data, got 1 in both"):
        opened(train, val_data=val)


def test_a_table_has_the_image_ids_of_its_images(tmp_path: Path) -> None:
    table = Path(write_pairs(tmp_path, 4))
    table.write_text(table.read_text() + "images/0.png\tthing again\n")
    ids = _image_ids(opened(table, val_fraction=0.0), 5)
    assert ids["thing again"] == ids["thing number 0"] and len(set(ids.values())) == 4
