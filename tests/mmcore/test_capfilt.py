"""mmcore capfilt: what is kept, written, resumed and read again; the models are stand-ins."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmcore import capfilt
from mmcore.capfilt import CapFiltConfig, Judges
from mmcore.data import DataConfig, open_data
from tests.refusals import refuses

NUM = 7


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.full((6, 6, 3), 10 * i, dtype=np.uint8))


def stand_ins(seen: list[int]) -> Judges:
    """Captions name the picture's grey; a text matches where it does."""

    def caption(images: Sequence[Image.Image], names: Sequence[int]) -> list[str]:
        seen.extend(names)
        return [f"grey {np.asarray(x)[0, 0, 0]}" for x in images]

    def match(images: Sequence[Image.Image], owner: Sequence[int], captions: list[str]) -> list[float]:
        greys = [str(np.asarray(images[i])[0, 0, 0]) for i in owner]
        return [0.75 if text.split()[-1] == grey else 0.25 for text, grey in zip(captions, greys, strict=True)]

    return Judges(caption, match)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr(capfilt, "judges_of", lambda _: stand_ins(found))
    return found


def own_caption(i: int) -> str:
    return f"a shade of {10 * i if i % 2 else 255}"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (folder / "pictures").mkdir(parents=True)
    for i in range(NUM):
        picture(i).save(folder / f"pictures/{i}.png")
    return [{"image": f"pictures/{i}.png", "image_id": f"p{i}", "caption": own_caption(i)} for i in range(NUM)]


def config(data: Path, out: Path, **options: Any) -> CapFiltConfig:
    return CapFiltConfig(
        out, Path("writer"), Path("judge"), DataConfig(str(data)), shard_size=3, batch_size=2, **options
    )


def test_json_is_kept_by_scores_and_goes_on_where_it_stopped(tmp_path: Path, seen: list[int]) -> None:
    file = tmp_path / "web.json"
    file.write_text(json.dumps(rows_of(tmp_path)))
    run = config(file, tmp_path / "out")
    said = list(capfilt.capfilt(run))
    assert "of 3 records 1 own and 3 written captions kept" in said[0] and said[-1].endswith("pairs.json: 10 pairs")
    kept = json.loads((tmp_path / "out/pairs.json").read_text())
    assert [x["caption"] for x in kept if x["source"] == "web"] == [own_caption(i) for i in (1, 3, 5)]
    assert {x["score"] for x in kept} == {0.75} and len(seen) == NUM
    # a shard that is lost is made again, the others are not
    first = (tmp_path / "out/00001.json").read_bytes()
    (tmp_path / "out/00001.json").unlink()
    again = list(capfilt.capfilt(run))
    assert len(seen) == NUM + 3 and "there already" in again[0]
    assert (tmp_path / "out/00001.json").read_bytes() == first
    source = open_data(DataConfig(str(tmp_path / "out/pairs.json"), val_fraction=0.0), seed=0).source
    assert source is not None and len(source) == 10  # pyright: ignore[reportArgumentType]
    refuses(
        "--least must be 0.5 as what is in", lambda: list(capfilt.capfilt(config(file, tmp_path / "out", least=0.6)))
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    refuses("--out must be a new folder", lambda: list(capfilt.capfilt(config(file, tmp_path / "full"))))
    high = config(file, tmp_path / "high", least=0.9)
    refuses("--filter must match some captions with --least 0.9, got none", lambda: list(capfilt.capfilt(high)))
    refuses("--top-p must be a share, got 0", lambda: config(file, tmp_path / "none", top_p=0.0))


def test_ranks_share_the_shards_and_a_picture_is_described_once(
    tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tmp_path)
    rows[1] |= {"image": rows[0]["image"], "image_id": "p0"}
    file = tmp_path / "web.json"
    file.write_text(json.dumps(rows))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        list(capfilt.capfilt(config(file, tmp_path / "out")))
    kept = json.loads((tmp_path / "out/pairs.json").read_text())
    assert sum(x["image_id"] == "p0" and x["source"] == "synthetic" for x in kept) == 1


def test_tables_and_tars_come_back_in_kind(tmp_path: Path, seen: list[int]) -> None:
    rows = rows_of(tmp_path)
    table = tmp_path / "web.tsv"
    table.write_text("filepath\ttitle\n" + "".join(f"{x['image']}\t{x['caption']}\n" for x in rows))
    list(capfilt.capfilt(config(table, tmp_path / "table")))
    source: Any = open_data(DataConfig(str(tmp_path / "table/pairs.csv"), val_fraction=0.0), seed=0).source
    assert len(source) == 10 and "grey 0" in source.texts
    shard = tmp_path / "web.tar"
    with tarfile.open(shard, "w") as opened:
        for i in range(NUM):
            png = io.BytesIO()
            picture(i).save(png, format="PNG")
            for suffix, content in (("png", png.getvalue()), ("txt", own_caption(i).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    list(capfilt.capfilt(config(shard, tmp_path / "tars")))
    data = open_data(DataConfig(str(tmp_path / "tars/00000.tar")), seed=0)
    assert data.num_train == 10 and sorted(data.captions())[:3] == sorted([own_caption(i) for i in (1, 3, 5)])
    with tarfile.open(tmp_path / "tars/00000.tar") as opened:
        about = json.loads(opened.extractfile("1-web.json").read())  # pyright: ignore[reportOptionalMemberAccess]
    assert about["source"] == "web" and about["score"] == 0.75


def test_built_in_pictures_are_written_beside(tmp_path: Path, seen: list[int]) -> None:
    options: Any = {"shard_size": 2000, "batch_size": 2000}
    run = CapFiltConfig(tmp_path / "out", Path("w"), Path("j"), DataConfig(wrong_captions=0.5), **options)
    list(capfilt.capfilt(run))
    kept = json.loads((tmp_path / "out/pairs.json").read_text())
    assert (tmp_path / "out" / kept[0]["image"]).is_file() and len(seen) == 1797


def test_wrong_captions_are_of_another_class_in_the_share_that_is_asked_for() -> None:
    source: Any = open_data(DataConfig(wrong_captions=0.4), seed=0).source
    classes = source.source.classes
    wrong = [classes[other] != classes[i] for i, other in enumerate(source.other)]
    changed = [other != i for i, other in enumerate(source.other)]
    assert sum(changed) == round(0.4 * len(source)) and wrong == changed
    assert sorted(source.other) == list(range(len(source)))
    again: Any = open_data(DataConfig(wrong_captions=0.4), seed=0).source
    assert again.other == source.other
    refuses("wrong_captions must be 0 with shuffle_pictures", open_data, DataConfig(wrong_captions=0.4, shuffle_pictures=True), seed=0)  # fmt: skip  # noqa: E501
    refuses("wrong_captions must be in", open_data, DataConfig(wrong_captions=1.4), seed=0)
