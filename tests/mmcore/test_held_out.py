"""A source of which all is held out."""

import json
from pathlib import Path

import pytest

from mmcore.data import DataConfig
from mmcore.data.held_out import open_held_out
from tests.mmcore.data_fixtures import image_bytes, write_pairs, write_shards, write_vqa


def test_every_image_of_a_json_file_comes_once_with_all_of_its_captions(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image_bytes(0, kind="PNG"))
    captions = {"a": ["one", "two"], "b": ["three"]}
    records = [{"image": f"{n}.png", "caption": c, "image_id": n} for n, of in captions.items() for c in of]
    (tmp_path / "x.json").write_text(json.dumps(records))
    val = open_held_out(DataConfig(str(tmp_path / "x.json"))).val
    assert val is not None and val.captions == [["one", "two"], ["three"]]
    assert val.names == ["a", "b"]
    assert [i for _, positions in val.raw_batches(8) for i in positions] == [0, 1]


def test_questions_are_all_held_out_in_order(tmp_path: Path) -> None:
    questions, annotations = write_vqa(tmp_path, 3)
    data = open_held_out(DataConfig(questions, annotations=annotations))
    assert data.val is None and data.val_questions is not None
    asked = [q.question_id for _, of in data.val_questions.raw_batches(4) for q in of]
    assert asked == [0, 1, 10, 11, 20, 21]


def test_tables_and_shards_are_too(tmp_path: Path) -> None:
    table = open_held_out(DataConfig(str(write_pairs(tmp_path, 5)))).val
    assert table is not None and len(table) == 5
    shards = open_held_out(DataConfig(write_shards(tmp_path, 2, 3))).val
    assert shards is not None and len(shards) == 6


def test_what_a_run_splits_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="--data must be a file or shards, of which all is held out"):
        open_held_out(DataConfig("digits"))
