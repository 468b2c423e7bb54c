"""Records by key: tables, JSON, JSONL, Parquet and data sets on disk; several captions, their weights, exact resume."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcore.data import DataConfig, PairData, open_data
from mmcore.data.broken import BrokenRecord
from mmcore.data.opening import open_chats, open_held_out
from mmcore.data.sources import columns
from mmcore.data.sources.captions import parse_caption_keys
from mmcore.data.sources.keyed import KeyedPairs
from tests.mmcore.data_fixtures import digest, fake_tokenizer, image_bytes, spec, train_loader, write_table
from tests.refusals import refuses

KEYS = "caption=0.75,alt=0.25"
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
HAS_DATASETS = importlib.util.find_spec("datasets") is not None
needs_pyarrow = pytest.mark.skipif(not HAS_PYARROW, reason="pyarrow is not installed (pip install pyarrow)")
needs_datasets = pytest.mark.skipif(not HAS_DATASETS, reason="datasets is not installed (pip install datasets)")


def records(folder: Path, num: int = 12) -> list[dict[str, Any]]:
    """A caption and a list of others each; the images lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        (folder / f"{i}.png").write_bytes(image_bytes(i))
    return [{"image": f"{i}.png", "caption": f"thing {i}", "alt": [f"it {i}", f"that {i}"]} for i in range(num)]


def write(kind: str, folder: Path, num: int = 12) -> str:
    found = records(folder, num)
    if kind == "csv":
        rows = [[r["image"], r["caption"], r["alt"][0]] for r in found]
        return write_table(folder, [["image", "caption", "alt"], *rows])
    if kind in ("json", "jsonl"):
        text = json.dumps(found) if kind == "json" else "\n".join(map(json.dumps, found)) + "\n\n"
        (folder / f"pairs.{kind}").write_text(text)
        return str(folder / f"pairs.{kind}")
    whole = [{**r, "image": {"bytes": image_bytes(i), "path": None}} for i, r in enumerate(found)]
    if kind == "parquet":
        arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        (folder / "parts").mkdir()
        for part, rows in enumerate((whole[: num // 2], whole[num // 2 :])):
            parquet.write_table(arrow.Table.from_pylist(rows), folder / f"parts/{part}.parquet", row_group_size=4)
        return str(folder / "parts")
    datasets: Any = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(whole).cast_column("image", datasets.Image())
    data.save_to_disk(folder / "disk", num_shards=2)
    return str(folder / "disk")


KINDS = [
    *("csv", "json", "jsonl"),
    pytest.param("parquet", marks=needs_pyarrow),
    pytest.param("hf", marks=[needs_pyarrow, needs_datasets]),
]


def opened(path: str, **config: Any) -> PairData:
    settings = {"caption_keys": KEYS, "image_key": "image", "max_broken": 0.0, **config}
    return open_data(DataConfig(path, **settings), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_drawn_by_the_weights_of_their_keys_and_a_run_resumes(kind: str, tmp_path: Path) -> None:
    data = opened(write(kind, tmp_path), val_fraction=0.25)
    source: Any = data.source
    assert isinstance(source, KeyedPairs) and data.num_train == 9 and data.val is not None and len(data.val) == 3
    told = [source.all_captions(i) for i in range(9)]
    number = told[4][0].removeprefix("thing ")
    alts = ["it"] if kind == "csv" else ["it", "that"]
    assert told[4] == [f"{x} {number}" for x in ("thing", *alts)]
    drawn = Counter(source.caption(4, np.random.default_rng(i)).split()[0] for i in range(400))
    assert set(drawn) == {"thing", *alts} and abs(drawn["thing"] - 300) < 40
    assert not {x for of in told for x in of} & {x for of in data.val.captions for x in of}
    first = next(train_loader(data, spec(9, image_size=8, augment=False), fake_tokenizer))
    shown = {caption.split()[1]: image for caption, image in zip(first.captions, first.images, strict=True)}
    wanted = opened(write("json", tmp_path / "other"), val_fraction=0.0).source
    assert isinstance(wanted, KeyedPairs) and len(shown) == 9
    assert source.raw_image(4).tobytes() == wanted.raw_image(int(number)).tobytes()
    again, resumed = (train_loader(data, spec(4, world_size=2, rank=1, workers=0), fake_tokenizer) for _ in range(2))
    next(again)
    resumed.load_state_dict(again.state_dict())
    assert digest(resumed, 3) == digest(again, 3)
    held_out = open_held_out(DataConfig(data.name, caption_keys=KEYS, image_key="image")).val
    assert held_out is not None and len(held_out) == 12 and len(held_out.captions[0]) == 1 + len(alts)


def test_a_record_without_a_key_draws_of_the_others_and_one_without_any_is_broken(tmp_path: Path) -> None:
    found = records(tmp_path, 6)
    del found[2]["alt"]
    found[3] |= {"caption": " ", "alt": [None, "other 3"]}
    found[4] |= {"caption": None, "alt": []}
    found[5] |= {"caption": 5}
    (tmp_path / "x.json").write_text(json.dumps([*found, "no record"]))
    data = opened(str(tmp_path / "x.json"), max_broken=0.5, val_fraction=0.0)
    assert data.broken == {"no caption or alt": 1, "caption is not text": 1, "record is not an object": 1}
    assert data.source is not None and isinstance(data.source, KeyedPairs)
    assert [data.source.all_captions(i) for i in (2, 3)] == [["thing 2"], ["other 3"]]
    keys = parse_caption_keys("a, b=2")
    assert keys.keys == ("a", "b") and keys.weights == (1.0, 2.0)
    with pytest.raises(BrokenRecord, match="no a or b"):
        keys.read({"a": float("nan"), "c": "x"})
    config = DataConfig(str(tmp_path / "x.json"), caption_keys="caption", max_broken=1.0, val_fraction=0.0)
    assert len(open_chats(config, seed=0).train) == 3


@pytest.mark.parametrize(("config", "sentence"), [
    ({"caption_keys": "text"}, r"keys of data='.*pairs.json', which has \['alt', 'caption', 'image'\], got 'text'"),
    ({"image_key": "url"}, "got 'url'"), ({"caption_keys": "a,a"}, "caption_keys must be different names, .*got 'a,a'"),
    ({"caption_keys": "a=0"}, "with weights above 0, got 'a=0'"), ({"caption_keys": "a=x"}, "got 'a=x'"),
    ({"caption_keys": ""}, "caption_keys must be different names"), ({"csv_img_key": "x"}, "csv_img_key has no effect"),
    ({"val_data": "pairs.json"}, "val_data must not be the training data"),
])  # fmt: skip
def test_wrong_keys_are_one_sentence(config: dict, sentence: str, tmp_path: Path) -> None:
    path = write("json", tmp_path)
    if "val_data" in config:
        config = {"val_data": path}
    refuses(sentence, opened, path, **config)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "x.parquet").write_bytes(b"x")
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setattr(columns.importlib.util, "find_spec", lambda name: None)
    refuses("Parquet files must be read by pyarrow, .*: pip install pyarrow", opened, str(tmp_path / "x.parquet"))
    (tmp_path / "x.parquet").unlink()
    refuses("on disk must be read by datasets, .*: pip install datasets", opened, str(tmp_path))


@needs_pyarrow
def test_parquet_is_read_by_windows_of_row_groups_each_once_an_epoch(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmcore.data.sources.keyed.WINDOW", 1)
    data = opened(write("parquet", tmp_path, 40), val_fraction=0.0)
    source: Any = data.source
    groups = source.table.groups(source.rows)[source.order(np.random.default_rng(0), None)]
    assert sorted(groups.tolist()) == sorted(source.table.groups(source.rows).tolist())
    assert (np.diff(groups) != 0).sum() == len(set(groups.tolist())) - 1 == 9
    refuses("must be Parquet, got .*x.parquet", opened, _damaged(tmp_path / "x.parquet"))
    refuses("must name existing Parquet files, got .*no.parquet", opened, str(tmp_path / "no.parquet"))


def _damaged(path: Path) -> str:
    path.write_bytes(b"PAR1 and no more")
    return str(path)


@needs_datasets
def test_a_class_of_a_data_set_on_disk_is_captioned_by_its_name_and_splits_are_asked_for(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": image_bytes(i), "path": None} for i in range(4)], "label": [0, 1, 1, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    found: Any = opened(str(tmp_path / "both/train"), caption_keys="label", val_fraction=0.0).source
    assert [found.all_captions(i) for i in range(4)] == [["cat"], ["dog"], ["dog"], ["cat"]]
    refuses("must be one split of a data set on disk, got the folder of test, train", opened, str(tmp_path / "both"))
