"""Tables of image paths and captions: columns, separators, bad lines, held-out images; sources all held out."""

import logging
from pathlib import Path
from typing import Any

import pytest

from mmcore.data import DataConfig, Preprocess
from mmcore.data.opening import open_held_out
from tests.mmcore.data_fixtures import (
    fake_tokenizer,
    image_bytes,
    opened,
    spec,
    take,
    train_loader,
    write_images,
    write_json,
    write_pairs,
    write_shards,
    write_table,
    write_vqa,
)
from tests.refusals import refuses

HEADER, PATHS = ["filepath", "title"], [f"{i}.png" for i in range(9)]


def test_paths_are_relative_to_the_table_or_absolute(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "elsewhere/b.png"])
    absolute = str(tmp_path / "elsewhere/b.png")
    data = opened(write_table(tmp_path, [HEADER, ["a.png", "one"], [absolute, "two"]]), val_fraction=0.0)
    assert data.val is None
    assert set(next(train_loader(data, spec(2), fake_tokenizer)).ids) == {str(tmp_path / "a.png"), absolute}
    assert list(data.captions()) == ["one", "two"]


def test_other_columns_separators_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, PATHS[:3])
    rows = [["img", "text", "id"], *([p, f"a, {i}", str(i)] for i, p in enumerate(PATHS[:3]))]
    table = Path(write_table(tmp_path, rows, ","))
    table.write_text(table.read_text(), encoding="utf-8-sig")
    keys: dict[str, Any] = {"csv_separator": ",", "csv_img_key": "img", "csv_caption_key": "text"}
    assert list(opened(table, **keys, val_fraction=0.0).captions()) == ["a, 0", "a, 1", "a, 2"]
    tab = write_table(tmp_path, [HEADER, *([p, "x"] for p in PATHS[:3])], "\t", "tab.tsv")
    # What a shell passes for --csv-separator '\t'.
    assert opened(tab, csv_separator="\\t", val_fraction=0.0).num_train == 3


@pytest.mark.parametrize(("row", "reason"), [
    (["0.png", ""], "empty caption"), (["0.png", "  "], "empty caption"), (["0.png", "NaN"], "empty caption"),
    (["", "a cat"], "empty path"),
    (["0.png"], "wrong number of columns"), (["0.png", "a", "cat"], "wrong number of columns"),
])  # fmt: skip
def test_a_bad_line_is_counted_logged_and_left_out(row: list[str], reason: str, tmp_path: Path, caplog):
    write_images(tmp_path, PATHS[:4])
    table = write_table(tmp_path, [HEADER, [PATHS[0], "good"], row, *([p, "good"] for p in PATHS[1:4])])
    with caplog.at_level(logging.WARNING, "mmcore.data"):
        data = opened(table, val_fraction=0.0, max_broken=0.2)
    assert caplog.messages == [f"skipped pairs.csv:3: {reason}"] and data.num_train == 4
    loader = train_loader(data, spec(2), fake_tokenizer)
    take(loader, 4)
    assert loader.broken == {reason: 1}
    message = rf"1 of 5 records of data=.* are broken \({reason} 1\)"
    refuses(message, opened, table, val_fraction=0.0, max_broken=0.19)


def test_a_missing_image_is_counted_and_all_missing_is_an_error_at_once(tmp_path: Path) -> None:
    write_images(tmp_path, PATHS)
    rows = [HEADER, *([p, f"c{i}"] for i, p in enumerate([*PATHS, "gone.png"]))]
    loader = train_loader(
        opened(write_table(tmp_path, rows), val_fraction=0.0, max_broken=0.5), spec(5), fake_tokenizer
    )
    take(loader, 4)
    assert loader.broken == {"missing file": 2}
    table = write_table(tmp_path, [HEADER, *([f"no/{i}.png", "x"] for i in range(500))], name="gone.csv")
    refuses("none of 100 tried exists, the first is .*no/0.png", opened, table)


def test_an_image_with_several_captions_is_one_held_out_image(tmp_path: Path) -> None:
    write_images(tmp_path, PATHS[:3])
    rows = [HEADER, *([p, f"{word} {p}"] for word in ("first", "second") for p in PATHS[:3])]
    held_out = opened(write_pairs(tmp_path / "train", 4), val_data=write_table(tmp_path, rows)).val
    assert held_out is not None and len(held_out) == 3
    assert held_out.captions == [[f"first {p}", f"second {p}"] for p in PATHS[:3]]


def test_held_out_images_that_are_broken_are_left_out_by_index(tmp_path: Path) -> None:
    val = write_pairs(tmp_path / "v", 6)
    (tmp_path / "v/images/2.png").write_bytes(b"")
    held_out = opened(write_pairs(tmp_path / "t", 4), val_data=val, max_broken=0.2).val
    assert held_out is not None
    batches = list(held_out.batches(2, Preprocess(8)))
    assert [indices.tolist() for _, indices in batches] == [[0, 1], [3], [4, 5]]
    assert [len(images) for images, _ in batches] == [2, 1, 2] and held_out.broken == {"empty file": 1}
    held_out.max_broken = 0.1
    message = r"1 of 6 records of the held-out images are broken \(empty file 1\)"
    refuses(message, lambda: list(held_out.batches(2, Preprocess(8))))
    refuses("batch_size must be at least 1, got 0", next, held_out.batches(0, Preprocess(8)))


PAIR = b"filepath\ttitle\na.png\tb\n"


@pytest.mark.parametrize(("content", "config", "sentence"), [
    (b"filepath\tcaption\na\tb\n", {}, r"csv_caption_key='title' must be a column .* \['filepath', 'caption'\]$"),
    (b"filepath,title\na,b\n", {}, "--csv-separator ',' would split it$"),
    (b"filepath;title\na;b\n", {}, "--csv-separator ';' would split it$"),
    (b"filepath|title\na|b\n", {}, r"--csv-separator '\|' would split it$"),
    (PAIR, {"csv_separator": ","}, r"--csv-separator '\\t' would split it$"),  # as it is typed
    (b"", {}, "must begin with a line of column names, got an empty file"),
    (b"filepath\ttitle\n", {}, "must hold at least one pair, got none"),
    (b"filepath\ttitle\n\n\n", {}, "must hold at least one pair, got none"),
    (b"filepath\ttitle\na\t\xff\xfe\n", {}, "must be a table in UTF-8"),
    (PAIR, {"csv_separator": ", "}, "csv_separator must be one character, got ', '"),
    (PAIR, {"val_fraction": 0.0}, "must have at least 2 training pairs, got 1"),
    (PAIR, {}, "must have at least 2 training pairs, got 0"),
    (PAIR, {"data": "no.csv"}, r"data must be an existing file, got 'no.csv'"),
    (PAIR, {"val_data": "no.csv"}, r"val_data must be an existing file, got 'no.csv'"),
    (PAIR, {"val_data": "TABLE"}, "val_data must not be the training table"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_as_asked_is_refused(content: bytes, config: dict, sentence: str, tmp_path: Path):
    table = tmp_path / "x.csv"
    table.write_bytes(content)
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    given: dict[str, Any] = {"data": str(table)} | {k: str(table) if v == "TABLE" else v for k, v in config.items()}
    refuses(sentence, opened, **given)


def test_every_image_of_a_json_file_comes_once_with_all_of_its_captions(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    captions = {"a": ["one", "two"], "b": ["three"]}
    records = [{"image": f"{n}.png", "caption": c, "image_id": n} for n, of in captions.items() for c in of]
    val = open_held_out(DataConfig(write_json(tmp_path / "x.json", records))).val
    assert val is not None and val.captions == [["one", "two"], ["three"]] and val.names == ["a", "b"]
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
    refuses("--data must be a file or shards, of which all is held out", open_held_out, DataConfig("digits"))
