"""Quote marks in tables: no row is lost to one, and captions in quotes stay whole."""

from pathlib import Path

import pytest

from mmcore.data import DataConfig, open_data
from tests.mmcore.data_fixtures import image_bytes

NAMES = [f"{i}.png" for i in range(12)]


def captions(folder: Path, written: dict[int, str], separator: str = "\t") -> list[str]:
    """Of a table of twelve pictures, where those in `written` stand as they are."""
    for i, name in enumerate(NAMES):
        (folder / name).write_bytes(image_bytes(i))
    rows = [f"{name}{separator}{written.get(i, f'caption {i}')}" for i, name in enumerate(NAMES)]
    (folder / "t.csv").write_text("\n".join([f"filepath{separator}title", *rows]))
    config = DataConfig(str(folder / "t.csv"), csv_separator=separator, val_fraction=0.0, max_broken=0.0)
    return list(open_data(config, seed=0).captions())


@pytest.mark.parametrize(("written", "expected"), [
    ({3: '"unbalanced dog'}, {3: '"unbalanced dog'}),
    ({3: '"two', 8: '"of them'}, {3: '"two', 8: '"of them'}),
    ({3: '"opened', 8: 'a 5" pipe'}, {3: '"opened', 8: 'a 5" pipe'}),
    ({3: '"opened', 8: 'closed"'}, {3: '"opened', 8: 'closed"'}),
    ({11: '"the last'}, {11: '"the last'}),
    ({2: 'a "red" dog', 5: '"quoted"', 7: '"a ""red"" dog"'}, {2: 'a "red" dog', 5: "quoted", 7: 'a "red" dog'}),
    ({4: '"two\nlines"'}, {4: "two\nlines"}),
    ({4: '"three\n\nlines, one empty"', 6: '"'}, {4: "three\n\nlines, one empty", 6: '"'}),
])  # fmt: skip
@pytest.mark.parametrize("separator", ["\t", "|"])
def test_a_quote_mark_swallows_no_row(written: dict, expected: dict, separator: str, tmp_path: Path) -> None:
    assert captions(tmp_path, written, separator) == [expected.get(i, f"caption {i}") for i in range(12)]


def test_a_comma_in_quotes_is_of_the_caption(tmp_path: Path) -> None:
    assert captions(tmp_path, {1: '"a dog, running"', 2: '"a cat,\nasleep"'}, ",")[1:3] == [
        "a dog, running",
        "a cat,\nasleep",
    ]


def test_held_out_pictures_of_a_table_are_not_trained_on_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "images")
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(image_bytes(i))
    rows = {"t.csv": ["images/0.png", "images/1.png", "images/2.png"], "v.csv": ["other/2.png", "images/3.png"]}
    for name, files in rows.items():
        (tmp_path / name).write_text("\n".join(["filepath\ttitle", *(f"{file}\tcaption {file}" for file in files)]))
    with pytest.raises(ValueError, match="val_data must not share images with data, got 1 in both"):
        open_data(DataConfig(str(tmp_path / "t.csv"), val_data=str(tmp_path / "v.csv")), seed=0)
    (tmp_path / "3.png").symlink_to("images/3.png")
    (tmp_path / "v.csv").write_text("filepath\ttitle\n3.png\tcaption\n")
    (tmp_path / "t.csv").write_text("filepath\ttitle\n./images/3.png\tother\nimages/1.png\tx")
    with pytest.raises(ValueError, match="val_data must not share images with data, got 1 in both"):
        open_data(DataConfig(str(tmp_path / "t.csv"), val_data=str(tmp_path / "v.csv")), seed=0)
    names = [f"{folder}/{i}.png" for i in range(4) for folder in ("images", "other")]
    (tmp_path / "w.csv").write_text("\n".join(["filepath\ttitle", *(f"{n}\tsaid of {n}" for n in names)]))
    for seed in range(4):
        data = open_data(DataConfig(str(tmp_path / "w.csv"), val_fraction=0.5), seed=seed)
        assert data.val is not None
        trained = {data.source.raw_image(i).tobytes() for i in range(len(data.source))}  # pyright: ignore
        assert not trained & {data.val.raw_image(i).tobytes() for i in range(len(data.val))}
