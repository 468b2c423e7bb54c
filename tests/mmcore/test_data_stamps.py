"""Stamps: captions, pictures, classes, split, and fetching with stand-ins for apt-get and dpkg-deb."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from mmcore.data import BrokenRecord, DataConfig, Preprocess, open_data
from mmcore.data.sources.stamps import Stamps, find_stamps, parse_stamp_caption
from tests.mmcore.data_fixtures import fake_tokenizer, opened, spec, take, train_loader, write_stamps
from tests.refusals import refuses

CACHED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcore" / "tuxpaint-stamps"

_APT_GET = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
*update*) [ -z "$NO_NETWORK" ] || { echo "W: slow" >&2; echo "E: Could not resolve host" >&2; exit 100; } ;;
*Dir::State*download*|*download*)
    case "$*" in
    *Dir::State*) ;;
    *) [ -z "$NO_LISTS" ] || { echo "E: Unable to locate package" >&2; exit 100; } ;;
    esac
    : > tuxpaint-stamps-default_1_all.deb ;;
esac
"""
_DPKG_DEB = """#!/bin/sh
mkdir -p "$3/usr/share/tuxpaint/stamps"
cp -r "$STAMPS/." "$3/usr/share/tuxpaint/stamps"
echo sound > "$3/usr/share/tuxpaint/stamps/food/0.ogg"
"""


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with stand-ins for apt-get and dpkg-deb; returns the file that records apt-get's calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (("apt-get", _APT_GET), ("dpkg-deb", _DPKG_DEB)):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("STAMPS", str(write_stamps(tmp_path / "package")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("NO_LISTS", "NO_NETWORK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "calls"


def test_a_caption_is_the_first_line_or_that_of_its_language() -> None:
    text = "A cat.\nzh.utf8=no\nzh_CN.utf8= 猫。 \nzh_TW.utf8=貓\n".encode()
    assert parse_stamp_caption(text, "en") == "A cat." and parse_stamp_caption(text, "zh_CN") == "猫。"
    assert parse_stamp_caption(b"A cat.\n", "zh_CN") is None
    assert parse_stamp_caption(b"A cat.\nzh_CN.utf8=\n", "zh_CN") is None and parse_stamp_caption(b"", "en") is None
    assert parse_stamp_caption(b"\nx.utf8=y", "en") is None
    with pytest.raises(BrokenRecord, match="caption is not UTF-8"):
        parse_stamp_caption(b"caf\xe9", "en")


def test_english_and_chinese_captions_classes_and_pictures(tmp_path: Path) -> None:
    root = write_stamps(tmp_path / "st")
    english = opened("stamps", stamps_dir=root, val_fraction=0.0)
    assert english.num_train == 13
    assert sorted(set(english.captions())) == sorted(
        {f"Thing {i}." for i in range(13) if i not in (3, 8)} | {"A thing, twice."}
    )
    assert english.class_names == ["animals", "food"]
    chinese = opened("stamps", stamps_dir=root, val_fraction=0.0, language="zh_CN")
    assert sorted(chinese.captions()) == sorted(f"东西{i}。" for i in range(13) if i != 5)
    assert chinese.class_names == ["动物", "食物"]
    assert chinese.templates is not None and all("{}" in t for t in chinese.templates)
    assert isinstance(english.source, Stamps)
    picture = np.asarray(english.source.raw_image(0))
    assert picture.shape[0] == picture.shape[1] >= 30 and (picture[0] == 255).all()
    assert (picture.reshape(-1, 3) == (0, 0, 200)).all(1).sum() == 16


def test_equal_captions_never_straddle_the_split_and_labels_are_top_folders(tmp_path: Path) -> None:
    root = write_stamps(tmp_path / "st")
    sides = set()
    for seed in range(12):
        data = opened("stamps", stamps_dir=root, val_fraction=0.3, seed=seed)
        assert data.val is not None and data.val.labels is not None and data.class_names is not None
        held_out = {c for captions in data.val.captions for c in captions}
        assert not held_out & set(data.captions()) and len(data.val) == 4
        names = [data.val.source.sample_id(i) for i in data.val.indices]
        assert [data.class_names[label] for label in data.val.labels] == [n.split("/")[0] for n in names]
        sides.add("A thing, twice." in held_out)
    assert sides == {True, False}


def test_stamps_in_the_package_layout_or_loose_in_a_folder_are_found(tmp_path: Path) -> None:
    write_stamps(tmp_path / "x" / "usr/share/tuxpaint/stamps")
    assert opened("stamps", stamps_dir=tmp_path / "x").class_names == ["animals", "food"]
    loose = opened("stamps", stamps_dir=tmp_path / "x" / "usr/share/tuxpaint/stamps/food")
    assert loose.class_names is None and loose.val is not None and loose.val.labels is None


def test_a_folder_without_stamps_or_without_the_language_is_refused(tmp_path: Path) -> None:
    refuses("stamps_dir must hold stamps", opened, "stamps", stamps_dir=tmp_path)
    root = write_stamps(tmp_path / "st")
    for text in root.rglob("*.txt"):
        text.write_text("English only.\n")
    with pytest.raises(ValueError, match="must have captions in language='zh_CN', got none"):
        opened("stamps", stamps_dir=root, language="zh_CN")


def test_the_package_is_fetched_once_and_only_pictures_and_captions_are_kept(debian: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert opened("stamps").num_train > 2
    assert len(debian.read_text().splitlines()) == 1
    cache = tmp_path / "cache" / "mmcore"
    assert {p.name for p in cache.iterdir()} == {"tuxpaint-stamps", ".mmcore-stamps.lock"}
    assert {p.suffix for p in cache.rglob("*.*") if p.is_file() and p.name[0] != "."} == {".png", ".txt"}


def test_the_package_is_fetched_into_a_given_folder_that_can_be_made(debian: Path, tmp_path: Path) -> None:
    assert find_stamps(tmp_path / "new" / "place") == tmp_path / "new" / "place"
    assert len(debian.read_text().splitlines()) == 1
    (tmp_path / "file").write_text("")
    refuses(r"could not be fetched \(.*\); .*--stamps-dir", find_stamps, tmp_path / "file/below/stamps")


def test_package_lists_of_our_own_serve_where_the_machine_has_none(debian: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_LISTS", "1")
    find_stamps(None)
    calls = debian.read_text().splitlines()
    assert len(calls) == 3 and calls[1].endswith("update") and "Dir::State=" in calls[1] and "Dir::Cache=" in calls[1]


def test_a_failed_fetch_leaves_nothing_behind_and_says_what_to_do(debian: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NO_LISTS", "1")
    monkeypatch.setenv("NO_NETWORK", "1")
    refuses(r"could not be fetched \(E: Could not resolve host\); .*--stamps-dir", find_stamps, None)
    assert {p.name for p in (tmp_path / "cache" / "mmcore").iterdir()} == {".mmcore-stamps.lock"}


def test_a_machine_without_apt_is_told_what_to_do(debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refuses(r"'stamps' needs apt-get, which is not installed, .*--stamps-dir", find_stamps, None)


def test_ranks_that_start_together_fetch_once(debian: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=find_stamps, args=(None,)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4 and len(debian.read_text().splitlines()) == 1


@pytest.mark.skipif(not CACHED.exists(), reason=f"the package is not unpacked in {CACHED}")
@pytest.mark.parametrize(("language", "num_pairs", "num_distinct"), [("en", 785, 674), ("zh_CN", 713, 599)])
def test_the_real_package_has_the_known_pairs_and_no_broken_one(language: str, num_pairs: int, num_distinct: int):
    config = DataConfig(data="stamps", language=language, max_broken=0.0)
    data = open_data(config, seed=0)
    assert data.val is not None and data.class_names is not None
    held_out = [c for captions in data.val.captions for c in captions]
    assert data.num_train + len(data.val) == num_pairs and len(set(data.captions()) | set(held_out)) == num_distinct
    assert len(data.class_names) == 16
    assert sum(len(indices) for _, indices in data.val.batches(64, Preprocess(32))) == len(data.val)
    loader = train_loader(data, spec(64, image_size=32), fake_tokenizer)
    take(loader, loader.steps_per_epoch)
    assert loader.broken == {}
