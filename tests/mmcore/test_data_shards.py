"""Tar shards: partition, streams, untrusted members, counting, held-out pairs."""

import gzip
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from mmcore.data import Preprocess
from mmcore.data.sources import shards, tar
from mmcore.data.sources.shards import ShardBatches
from tests.mmcore.data_fixtures import (
    PairLoader,
    assert_equal_batches,
    fake_tokenizer,
    image_bytes,
    opened,
    pair_reader,
    spec,
    take,
    train_loader,
    write_shards,
    write_tar,
)
from tests.refusals import refuses


def _loader(folder: Path, members: list, max_broken: float = 1.0, **config) -> PairLoader:
    """Loader of one shard of `members` between ten sound pairs, batches of five."""
    sound = [(f"ok{i}.{s}", d) for i in range(10) for s, d in (("jpg", image_bytes(i)), ("txt", b"a caption"))]
    path = write_tar(folder / "x.tar", [*sound[:10], *members, *sound[10:]])
    data = opened(path, max_broken=max_broken, **config)
    return train_loader(data, spec(5), fake_tokenizer)


def _pair(name: str, number: int = 99, caption: str = "bad", metadata: bytes | None = None) -> list[tuple[str, bytes]]:
    members = [(f"{name}.jpg", image_bytes(number)), (f"{name}.txt", caption.encode())]
    return members if metadata is None else [*members, (f"{name}.json", metadata)]


def _link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (1, 3), (3, 2)])
def test_streams_are_disjoint_and_together_hold_every_sample(world_size: int, workers: int, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 7, 4)
    everything = {f"{s:03d}.tar:s{s}_{i}" for s in range(7) for i in range(4)}
    num_streams = max(1, workers)
    for num_pass in (0, 1):
        seen: Counter[str] = Counter()
        for rank in range(world_size):
            cursors = [[0, 0] for _ in range(num_streams)]
            batches = ShardBatches(
                tar.expand_shards(pattern, "data"), spec(2, rank, world_size, workers=workers),
                pair_reader(spec(), fake_tokenizer), cursors,
            )  # fmt: skip
            for stream in range(num_streams):
                seen.update(tar.sample_id(s) for s in batches.samples(stream, num_pass))
        assert set(seen) == everything and set(seen.values()) == {1}


def test_passes_differ_in_order_and_samples_of_different_shards_mix(tmp_path: Path) -> None:
    loader = train_loader(opened(write_shards(tmp_path, 4, 4)), spec(4), fake_tokenizer)
    first, second = take(loader, 4), take(loader, 4)
    assert [b.ids for b in first] != [b.ids for b in second]
    assert any(len({i.split(":")[0] for i in b.ids}) > 1 for b in first)


def test_a_small_buffer_resumes_exactly_amid_broken_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHUFFLE_BUFFER", 3)
    pattern = write_shards(tmp_path, 2, 9)
    write_tar(tmp_path / "002.tar", [*_pair("a"), ("b.jpg", b"junk"), ("b.txt", b"x"), *_pair("/c"), ("d.txt", b"x")])
    data = opened(pattern.replace("001", "002"), max_broken=0.5)
    unbroken = train_loader(data, spec(4), fake_tokenizer)
    for _ in range(9):
        state = unbroken.state_dict()
        want = take(unbroken, 3)
        resumed = train_loader(data, spec(4), fake_tokenizer)
        resumed.load_state_dict(state)
        assert_equal_batches(take(resumed, 3), want)
        assert resumed.broken == unbroken.broken
    assert set(unbroken.broken) == {"not an image", "absolute path in tar", "no image"}


@pytest.mark.parametrize(("members", "reason"), [
    (lambda: _pair("/etc/x"), "absolute path in tar"), (lambda: _pair("../x"), "path with .. in tar"),
    (lambda: _pair("a/../../x"), "path with .. in tar"),
    (lambda: [(_link("x.jpg", "/etc/passwd", tarfile.SYMTYPE), b""), ("x.txt", b"y")], "link in tar"),
    (lambda: [(_link("x.jpg", "ok0.jpg", tarfile.LNKTYPE), b""), ("x.txt", b"y")], "link in tar"),
    (lambda: [(_link("x.jpg", "", tarfile.FIFOTYPE), b""), ("x.txt", b"y")], "special file in tar"),
    (lambda: [*_pair("x"), ("x.JPG", b"again")], "duplicate name in tar"),
    (lambda: [*_pair("x"), ("x.__key__", b"z")], "reserved suffix in tar"),
    (lambda: [("x.jpg", image_bytes(0))], "no caption"), (lambda: [("x.txt", b"alone")], "no image"),
    (lambda: [("x.jpg", image_bytes(0)), ("x.txt", b" \n")], "empty caption"),
    (lambda: [("x.jpg", image_bytes(0)), ("x.txt", b"\xff\xfe\xff")], "caption is not UTF-8"),
    (lambda: [*_pair("x"), ("x.json", b"{image_id: 1}")], "metadata is not JSON"),
    (lambda: [*_pair("x"), ("x.json", b"[" * 100_000)], "metadata is not JSON"),
    (lambda: [*_pair("x"), ("x.json", b"[1]")], "metadata is not JSON"),
    (lambda: [*_pair("x"), ("x.json", b'{"image_id": 1.5}')], "image_id is neither text nor a whole number"),
    (lambda: [*_pair("x"), ("x.json", b'{"image_id": ""}')], "image_id is neither text nor a whole number"),
    (lambda: [("x.jpg", b""), ("x.txt", b"y")], "empty file"),
    (lambda: [("x.jpg", b"GIF?"), ("x.txt", b"y")], "not an image"),
    (lambda: [("x.jpg", image_bytes(0, (64, 64), "JPEG")[:400]), ("x.txt", b"y")], "damaged image"),
])  # fmt: skip
def test_a_bad_member_is_counted_by_its_reason_and_never_trained_on(members: Callable[[], list], reason: str, tmp_path):
    loader = _loader(tmp_path, members())
    # Ten good samples a pass, so the twelfth batch of five ends somewhere in the sixth pass.
    batches = take(loader, 12)
    assert all(i.startswith("x.tar:ok") for batch in batches for i in batch.ids) and set(loader.broken) == {reason}
    assert 5 <= loader.broken[reason] <= 6


def test_the_image_id_is_that_of_the_json_member_or_else_the_samples_own(tmp_path: Path) -> None:
    ids = [b'{"image_id": 7}', b'{"image_id": "7", "url": "x"}', b'{"image_id": null}', b'{"key": "x"}', None]
    for shard in range(2):
        samples = [_pair(str(i), i, metadata=metadata) for i, metadata in enumerate(ids)]
        write_tar(tmp_path / f"{shard}.tar", chain(*samples))
    data = opened(str(tmp_path / "{0..1}.tar"))
    batch = next(train_loader(data, spec(10), None))
    image_ids = dict(zip(batch.ids, batch.image_ids.tolist(), strict=True))
    shared = {image_ids[f"{shard}.tar:{i}"] for shard in range(2) for i in range(2)}
    assert len(shared) == 1
    # Samples of the same key in two shards are two images.
    assert len(set(image_ids.values()) - shared) == 6


def test_a_member_above_the_size_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 5_000)
    loader = _loader(tmp_path, [("x.jpg", bytes(5_001)), ("x.txt", b"y")])
    take(loader, 4)
    assert set(loader.broken) == {"member above the size limit"}


def test_folders_metadata_and_dotted_names_do_not_count_as_records(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("sub")
    folder.type = tarfile.DIRTYPE
    loader = _loader(tmp_path, [(folder, b""), ("__meta__", b"x"), ("README", b"x"), *_pair("./sub/good.a")])
    take(loader, 6)
    assert [reason[:12] for reason in loader.broken] == ["no image (by"]
    loader = _loader(tmp_path / "more", [(folder, b""), ("__meta__", b"x"), ("README", b"x"), *_pair("./sub/good")])
    assert any("x.tar:./sub/good" in batch.ids for batch in take(loader, 3)) and loader.broken == {}


# Inside a header, between two members, inside the padding of one, inside its bytes.
@pytest.mark.parametrize("cut", [4708, 4608, 4196, 2600])
def test_a_truncated_shard_counts_once_and_its_sound_part_is_used(cut: int, tmp_path: Path) -> None:
    pattern, file = write_shards(tmp_path, 2, 8), tmp_path / "001.tar"
    file.write_bytes(file.read_bytes()[:cut])
    loader = train_loader(opened(pattern, num_samples=9, max_broken=1.0), spec(3), fake_tokenizer)
    ids = {i for batch in take(loader, 5) for i in batch.ids}
    assert loader.broken["damaged tar"] == 1 and any(i.startswith("001") for i in ids)
    refuses(r"001.tar must be an undamaged, uncompressed tar .*num_samples", opened, pattern)


def test_compressed_and_piped_shards_train_when_num_samples_is_given(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 6)
    (tmp_path / "z.tar.gz").write_bytes(gzip.compress((tmp_path / "000.tar").read_bytes()))
    for url in (str(tmp_path / "z.tar.gz"), f"pipe:cat {tmp_path}/000.tar"):
        refuses("num_samples", opened, url)
        data = opened(url, num_samples=6)
        loader = train_loader(data, spec(3), fake_tokenizer)
        assert len({i for batch in take(loader, 2) for i in batch.ids}) == 6
        take(loader, 5)
        assert loader.broken == {}


@pytest.mark.parametrize("command", ["false tar", "cat {}/000.tar; exit 3"])
def test_a_pipe_that_fails_is_counted_as_a_damaged_shard(command: str, tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 6)
    url = f"{tmp_path}/000.tar::pipe:{command.format(tmp_path)}"
    data = opened(url, num_samples=6, max_broken=1.0)
    loader = train_loader(data, spec(3), fake_tokenizer)
    take(loader, 5)
    # webdataset drops what is unread when it learns of the failure, so the last sample may lack its caption.
    assert loader.broken["damaged tar"] >= 1 and set(loader.broken) <= {"damaged tar", "no caption"}


def test_a_pipe_may_be_left_half_read(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 1, 200)
    samples = tar.shard_samples(iter([f"pipe:cat {pattern.replace('{000..000}', '000')}"]))
    next(samples)
    # A generator that yields while it is closed raises a RuntimeError here.
    samples.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_num_samples_sets_the_steps_of_an_epoch_and_else_is_counted(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 3, 5)
    given = opened(pattern, num_samples=9)
    loader = train_loader(given, spec(4), fake_tokenizer)
    assert (opened(pattern).num_train, given.num_train, loader.steps_per_epoch) == (15, 9, 2)
    assert [batch.epoch for batch in take(loader, 5)] == [0, 0, 1, 1, 2]


def test_captions_are_those_of_the_training_shards_in_order(tmp_path: Path) -> None:
    data = opened(write_shards(tmp_path, 2, 3))
    assert list(data.captions()) == [f"caption number {i}" for i in range(6)]


def test_held_out_shards_give_every_image_with_its_caption(tmp_path: Path) -> None:
    train, val = write_shards(tmp_path / "train", 2, 3), write_shards(tmp_path / "val", 2, 4)
    held_out = opened(train, val_data=val).val
    assert held_out is not None and held_out.captions == [[f"caption number {i}"] for i in range(8)]
    assert held_out.labels is None
    assert [i for _, indices in held_out.batches(3, Preprocess(8)) for i in indices.tolist()] == list(range(8))
    assert held_out.raw_image(1).size == (20, 14)


def test_names_and_image_ids_that_are_no_unicode_train(tmp_path: Path) -> None:
    # how Python reads bytes that are not UTF-8
    members = [*_pair("a", 0), *_pair("b\udcff", 1), *_pair("c\udcfe", 2, metadata=b'{"image_id": "\\ud800"}')]
    data = opened(str(write_tar(tmp_path / "x.tar", members)))
    loader = train_loader(data, spec(3), fake_tokenizer)
    assert len(set(next(loader).image_ids.tolist())) == 3 and loader.broken == {}


def test_held_out_shards_of_one_file_name_in_two_folders_are_not_mixed_up(tmp_path: Path) -> None:
    for name in "ab":
        write_shards(tmp_path / name, 1, 3)
    train = write_shards(tmp_path / "train", 1, 3)
    data = opened(train, val_data=str(tmp_path / "{a,b}" / "000.tar"))
    assert data.val is not None and len(data.val) == 6


def test_held_out_samples_of_one_image_id_are_one_image(tmp_path: Path) -> None:
    ids = [b'{"image_id": 7}', b'{"image_id": 8}', b'{"image_id": 7}', None, b"{}", b""]
    val = write_tar(tmp_path / "val.tar", chain(*(_pair(str(i), i, f"caption {i}", x) for i, x in enumerate(ids))))
    data = opened(write_shards(tmp_path, 2, 3), val_data=str(val), max_broken=0.2)
    assert data.val is not None
    assert data.val.captions == [["caption 0", "caption 2"], ["caption 1"], ["caption 3"], ["caption 4"]]
    assert list(data.val.indices) == [0, 1, 3, 4]


def test_more_streams_than_shards_are_refused(tmp_path: Path) -> None:
    data = opened(write_shards(tmp_path, 3, 4))
    with pytest.raises(ValueError, match=r"world_size x workers must be at most the 3 shards, got 2 x 2"):
        train_loader(data, spec(1, 0, 2, workers=2), fake_tokenizer)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_pair_stop_the_first_batch(workers: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    refuses(r"must hold at least 2 pairs .* got 0", opened, path)
    loader = train_loader(opened(path, num_samples=5, max_broken=1.0), spec(2, workers=workers), fake_tokenizer)
    refuses(r"rank 0 found none among 2 samples; x.tar:.: no caption", next, loader)


def test_too_many_broken_records_stop_the_run_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    loader = _loader(tmp_path, _pair("/bad"), max_broken=0.05, num_samples=10)
    refuses(r"1 of 11 records .* are broken \(absolute path in tar 1\)", take, loader, 3)


def test_bad_names_of_shards_are_refused_in_one_sentence(tmp_path: Path) -> None:
    pattern, empty = write_shards(tmp_path, 2, 3), write_tar(tmp_path / "empty.tar", [])
    refuses("1 of 3 are missing, the first is .*002.tar", opened, pattern.replace("001}", "002}"))
    refuses("must name each shard once", opened, tmp_path / "{000,000}.tar")
    refuses("val_data must not share shards with data", opened, pattern, val_data=str(tmp_path / "001.tar"))
    refuses("val_data must be local files, got 'pipe:cat x.tar'", opened, pattern, val_data="pipe:cat x.tar")
    refuses("must hold at least one pair, got none", opened, pattern, val_data=str(empty))


def test_a_run_goes_on_with_as_many_streams_as_it_had_where_workers_are_left_to_the_machine(tmp_path: Path) -> None:
    data = opened(write_shards(tmp_path, 4, 3))
    before = train_loader(data, spec(2, workers=2), fake_tokenizer)
    first = take(before, 2)
    after = train_loader(data, spec(2, workers=None), fake_tokenizer)
    after.load_state_dict(before.state_dict())
    assert_equal_batches(take(after, 2), take(before, 2))
    assert first and after.state_dict()["num_streams"] == 2
    with pytest.raises(ValueError, match=r"num_streams must be .*2, got 1; it is that of --workers"):
        train_loader(data, spec(2, workers=1), fake_tokenizer).load_state_dict(before.state_dict())
