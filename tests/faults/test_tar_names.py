"""Members of tar shards with more than one dot in their names: the message says which rule makes them no pair."""

from pathlib import Path

import pytest

from mmcore.data import DataConfig, open_data
from tests.mmcore.data_fixtures import fake_tokenizer, image_bytes, opened, spec, take, train_loader, write_tar
from tests.refusals import refuses

RULE = r"by webdataset's rule a key ends at the first dot of a name: rename x\.v2\.jpg"
DOTTED = [("img{}.v2.jpg", "img{}.v2.txt"), ("a.b/img{}.v2.JPG", "a.b/img{}.txt"), ("img{}.png", "img{}.en.txt")]


def shard(folder: Path, name: str, pairs: list[tuple[str, str]]) -> str:
    members = [(x, data) for i, pair in enumerate(pairs) for x, data in zip(pair, (image_bytes(i), b"a caption"))]
    return str(write_tar(folder / name, members))


def named(pair: tuple[str, str], count: int) -> list[tuple[str, str]]:
    return [(pair[0].format(i), pair[1].format(i)) for i in range(count)]


@pytest.mark.parametrize("pair", DOTTED)
def test_shards_of_such_names_alone_are_refused_with_the_rule(pair: tuple[str, str], tmp_path: Path) -> None:
    path = shard(tmp_path, "x.tar", named(pair, 12))
    loader = train_loader(opened(path, max_broken=1.0), spec(4), fake_tokenizer)
    refuses(f"shards must hold images .*: no (image|caption) \\({RULE}", take, loader, 1)
    sound = shard(tmp_path, "sound.tar", named(("{}.png", "{}.txt"), 12))
    held_out = DataConfig(sound, val_data=path)
    refuses(f"12 of 12 records of val_data=.* are broken \\(no (image|caption) \\({RULE}", open_data, held_out, seed=0)


def test_one_such_name_among_others_is_a_broken_record_with_the_rule(tmp_path: Path) -> None:
    pairs = [*named(("{}.png", "{}.txt"), 9), ("odd.v2.jpg", "odd.v2.txt")]
    data = opened(shard(tmp_path, "x.tar", pairs), max_broken=0.5)
    loader = train_loader(data, spec(3), fake_tokenizer)
    take(loader, 8)
    assert len(loader.broken) == 1 and "webdataset's rule" in next(iter(loader.broken))


def test_names_that_begin_alike_up_to_their_first_dot_are_refused_with_the_rule(tmp_path: Path) -> None:
    path = shard(tmp_path, "x.tar", named(("2024.{}.png", "2024.{}.txt"), 9))
    refuses(f"at least 2 pairs .* got 1: {RULE}", open_data, DataConfig(path), seed=0)


def test_dots_in_folders_and_further_members_of_a_pair_are_no_fault(tmp_path: Path) -> None:
    pairs = [*named(("v1.0/{}.png", "v1.0/{}.txt"), 6), ("v1.0/5.seg.png", "v1.0/5.en.txt")]
    data = opened(shard(tmp_path, "x.tar", pairs))
    loader = train_loader(data, spec(3), fake_tokenizer)
    assert len(take(loader, 4)) == 4 and not loader.broken
