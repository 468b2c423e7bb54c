"""Tables of image paths and captions: columns, separators, bad lines, held-out images."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mmcore.data import DataConfig, open_data
from tests.mmcore.data_fixtures import fake_tokenizer, image_bytes, spec, take, write_pairs, write_table

HEADER = ["filepath", "title"]


def _images(folder: Path, num: int) -> list[str]:
    for i in range(num):
        (folder / f"{i}.png").write_bytes(image_bytes(i))
    return [f"{i}.png" for i in range(num)]


def test_paths_are_relative_to_the_table_or_absolute(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.png", "elsewhere/b.png"):
        (tmp_path / name).write_bytes(image_bytes(1))
    absolute = str(tmp_path / "elsewhere" / "b.png")
    table = write_table(tmp_path, [HEADER, ["a.png", "one"], [absolute, "two"]])
    data = open_data(DataConfig(data=table, val_fraction=0.0), seed=0)
    assert data.val is None
    assert set(next(data.train_loader(spec(2), fake_tokenizer)).ids) == {str(tmp_path / "a.png"), absolute}
    assert list(data.captions()) == ["one", "two"]


def test_other_columns_separators_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    paths = _images(tmp_path, 3)
    rows = [["img", "text", "id"], *([p, f"a, {i}", str(i)] for i, p in enumerate(paths))]
    table = Path(write_table(tmp_path, rows, ","))
    table.write_text(table.read_text(), encoding="utf-8-sig")
    config = DataConfig(
        data=str(table), csv_separator=",", csv_img_key="img", csv_caption_key="text", val_fraction=0.0
    )
    assert list(open_data(config, seed=0).captions()) == ["a, 0", "a, 1", "a, 2"]
    tab = write_table(tmp_path, [HEADER, *([p, "x"] for p in paths)], "\t", "tab.tsv")
    # What a shell passes for --csv-separator '\t'.
    assert open_data(DataConfig(data=tab, csv_separator="\\t", val_fraction=0.0), seed=0).num_train == 3


def test_a_wrong_column_names_the_columns_present(tmp_path: Path) -> None:
    table = write_table(tmp_path, [["filepath", "caption"], ["a", "b"]])
    with pytest.raises(
        ValueError, match=r"csv_caption_key='title' must be a column .* \['filepath', 'caption'\]$"
    ):
        open_data(DataConfig(data=table), seed=0)


@pytest.mark.parametrize(("separator", "shown"), [(",", ","), (";", ";"), ("|", "|")])
def test_a_single_column_suggests_the_separator(separator: str, shown: str, tmp_path: Path) -> None:
    table = write_table(tmp_path, [HEADER, ["a", "b"]], separator)
    with pytest.raises(ValueError) as caught:
        open_data(DataConfig(data=table), seed=0)
    assert str(caught.value).endswith(f"--csv-separator '{shown}' would split it")


def test_a_tab_is_suggested_as_it_is_typed(tmp_path: Path) -> None:
    table = write_table(tmp_path, [HEADER, ["a", "b"]])
    with pytest.raises(ValueError, match=r"--csv-separator '\\t' would split it"):
        open_data(DataConfig(data=table, csv_separator=","), seed=0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["0.png", ""], "empty caption"),
        (["0.png", "  "], "empty caption"),
        (["0.png", "nan"], "caption is a number"),
        (["0.png", "3.5"], "caption is a number"),
        (["", "a cat"], "empty path"),
        (["0.png"], "wrong number of columns"),
        (["0.png", "a", "cat"], "wrong number of columns"),
    ],
)
def test_a_bad_line_is_counted_logged_and_left_out(
    row: list[str], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = _images(tmp_path, 4)
    table = write_table(tmp_path, [HEADER, [paths[0], "good"], row, *([p, "good"] for p in paths[1:])])
    with caplog.at_level(logging.WARNING, "mmcore.data"):
        data = open_data(DataConfig(data=table, val_fraction=0.0, max_broken=0.2), seed=0)
    assert caplog.messages == [f"skipped pairs.csv:3: {reason}"]
    assert data.num_train == 4
    loader = data.train_loader(spec(2), fake_tokenizer)
    take(loader, 4)
    assert loader.broken == {reason: 1}
    with pytest.raises(ValueError, match=rf"1 of 5 records of data=.* are broken \({reason} 1\)"):
        open_data(DataConfig(data=table, val_fraction=0.0, max_broken=0.19), seed=0)


def test_a_missing_image_is_counted_and_all_missing_is_an_error_at_once(tmp_path: Path) -> None:
    paths = _images(tmp_path, 9)
    rows = [HEADER, *([p, f"c{i}"] for i, p in enumerate([*paths, "gone.png"]))]
    data = open_data(DataConfig(data=write_table(tmp_path, rows), val_fraction=0.0, max_broken=0.5), seed=0)
    loader = data.train_loader(spec(5), fake_tokenizer)
    take(loader, 4)
    assert loader.broken == {"missing file": 2}
    table = write_table(tmp_path, [HEADER, *([f"no/{i}.png", "x"] for i in range(500))], name="gone.csv")
    with pytest.raises(ValueError, match=r"none of 100 tried exists, the first is .*no/0.png"):
        open_data(DataConfig(data=table), seed=0)


def test_an_image_with_several_captions_is_one_held_out_image(tmp_path: Path) -> None:
    paths = _images(tmp_path, 3)
    rows = [HEADER, *([p, f"{word} {p}"] for word in ("first", "second") for p in paths)]
    (tmp_path / "train").mkdir()
    config = DataConfig(data=write_pairs(tmp_path / "train", 4), val_data=write_table(tmp_path, rows))
    held_out = open_data(config, seed=0).val
    assert held_out is not None
    assert len(held_out) == 3
    assert held_out.captions == [[f"first {p}", f"second {p}"] for p in paths]


def test_held_out_images_that_are_broken_are_left_out_by_index(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "t").mkdir()
    val = write_pairs(tmp_path / "v", 6)
    (tmp_path / "v" / "images" / "2.png").write_bytes(b"")
    config = DataConfig(data=write_pairs(tmp_path / "t", 4), val_data=val, max_broken=0.2)
    held_out = open_data(config, seed=0).val
    assert held_out is not None
    batches = list(held_out.batches(2, 8))
    assert [indices.tolist() for _, indices in batches] == [[0, 1], [3, 4], [5]]
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    assert held_out.broken == {"empty file": 1}
    held_out.max_broken = 0.1
    with pytest.raises(
        ValueError, match=r"1 of 6 records of the held-out images are broken \(empty file 1\)"
    ):
        list(held_out.batches(2, 8))
    with pytest.raises(ValueError, match="batch_size and image_size must be at least 1, got 0 and 8"):
        next(held_out.batches(0, 8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must begin with a line of column names, got an empty file"),
        (b"filepath\ttitle\n", "must hold at least one pair, got none"),
        (b"filepath\ttitle\n\n\n", "must hold at least one pair, got none"),
        (b"filepath\ttitle\na\t\xff\xfe\n", "must be a table in UTF-8"),
        (
            b"filepath\ttitle\na\t" + b"x" * 200_000 + b"\n",
            "must be a table in UTF-8, got: field larger than",
        ),
    ],
)
def test_a_table_without_pairs_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        open_data(DataConfig(data=str(tmp_path / "x.csv")), seed=0)


def test_other_bad_settings_of_a_table_are_refused(tmp_path: Path) -> None:
    table = write_pairs(tmp_path, 1)
    with pytest.raises(ValueError, match=r"data must be an existing file, got 'no.csv'"):
        open_data(DataConfig(data="no.csv"), seed=0)
    with pytest.raises(ValueError, match=r"val_data must be an existing file, got 'no.csv'"):
        open_data(DataConfig(data=table, val_data="no.csv"), seed=0)
    with pytest.raises(ValueError, match="val_data must not be the training table"):
        open_data(DataConfig(data=table, val_data=table), seed=0)
    with pytest.raises(ValueError, match="csv_separator must be one character, got ', '"):
        open_data(DataConfig(data=table, csv_separator=", "), seed=0)
    with pytest.raises(ValueError, match="must have at least 2 training pairs, got 1"):
        open_data(DataConfig(data=table, val_fraction=0.0), seed=0)
    with pytest.raises(ValueError, match="must have at least 2 training pairs, got 0"):
        open_data(DataConfig(data=table), seed=0)
