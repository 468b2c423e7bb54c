"""Several sources as one, drawing with replacement, and indexed shards: weights, resume, other numbers of ranks."""

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcore.data import DataConfig, PairData, open_data
from mmcore.data.opening import open_chats
from mmcore.data.sources.mixed import Drawn, Mixed
from mmcore.data.sources.shard_index import IndexedPairs, open_index
from mmcore.data.sources.tar import expand_shards
from tests.mmcore.data_fixtures import (
    assert_equal_batches,
    digest,
    fake_tokenizer,
    image_bytes,
    spec,
    take,
    train_loader,
    write_pairs,
    write_shards,
    write_tar,
)
from tests.refusals import refuses


def opened(data: str, **config: Any) -> PairData:
    return open_data(DataConfig(data, **config), seed=0)


def mixed(folder: Path, **config: Any) -> PairData:
    """17 pairs of a table and 12 of shards."""
    table, shards = write_pairs(folder / "table", 17), write_shards(folder / "shards", 3, 4)
    return opened(f"{table}::{shards}", shard_index=folder / "index", **config)


def test_what_a_mix_holds_out_is_of_any_kind(tmp_path: Path) -> None:
    data = opened("digits::digits", val_data=write_pairs(tmp_path / "val", 5))
    assert data.num_train == 2 * 1797 and data.val is not None and len(data.val) == 5
    batch = next(train_loader(data, spec(512, image_size=8), fake_tokenizer))
    named: dict[str, set[int]] = {}
    for caption, label in zip(batch.captions, batch.labels.tolist(), strict=True):
        named.setdefault(caption, set()).add(label)
    assert max(map(len, named.values())) == 2  # a class is its own source's


def test_a_mix_is_all_of_its_sources_and_holds_out_what_is_given(tmp_path: Path) -> None:
    data = mixed(tmp_path, val_data=write_pairs(tmp_path / "val", 5))
    assert isinstance(data.source, Mixed) and data.num_train == 29 and data.val is not None and len(data.val) == 5
    batches = take(train_loader(data, spec(29), fake_tokenizer), 1)
    captions = Counter(batches[0].captions)
    assert set(captions.values()) == {1} and sum("caption number" in x for x in captions) == 12
    again, resumed = (train_loader(data, spec(4), fake_tokenizer) for _ in range(2))
    take(again, 3)
    resumed.load_state_dict(again.state_dict())
    assert digest(resumed, 8) == digest(again, 8)
    assert len(data.captions()) == 29


def test_records_are_drawn_by_the_weight_of_their_source_and_anew_each_time(tmp_path: Path) -> None:
    data = mixed(tmp_path, data_weights="1::3", with_replacement=True, num_samples=400)
    assert data.num_train == 400 and data.val is None and isinstance(data.source, Mixed)
    loader = train_loader(data, spec(40), fake_tokenizer)
    assert loader.steps_per_epoch == 10
    batches = take(loader, 10)
    drawn = Counter("caption number" in x for batch in batches for x in batch.captions)
    share = 3 * 12 / (17 + 3 * 12)
    assert abs(drawn[True] / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5
    counts = Counter(x for batch in batches for x in batch.captions)
    assert len(counts) == 29 and max(counts.values()) > min(counts.values())
    shown = [
        image
        for batch in batches
        for x, image in zip(batch.captions, batch.images, strict=True)
        if x == "thing number 3"
    ]
    assert len({image.numpy().tobytes() for image in shown}) > 1  # augmented anew
    resumed = train_loader(data, spec(20, rank=1, world_size=2), fake_tokenizer)
    first = train_loader(data, spec(20, rank=0, world_size=2), fake_tokenizer)
    whole = train_loader(data, spec(40), fake_tokenizer)
    take(whole, 3)
    for part in (first, resumed):  # on two ranks
        part.load_state_dict(whole.state_dict())
    [a], [b], [c] = take(first, 1), take(resumed, 1), take(whole, 1)
    assert a.ids + b.ids == c.ids
    alike = Drawn(data.source, 1000).order(np.random.default_rng(0), spec()) % 29
    assert len(set(alike.tolist())) == 29


def test_indexed_shards_give_the_same_batches_on_any_number_of_ranks_and_workers(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 3, 8)
    data = opened(pattern, shard_index=tmp_path / "index")
    assert isinstance(data.source, IndexedPairs) and data.num_train == 24
    streamed = take(train_loader(opened(pattern), spec(24, augment=False), fake_tokenizer), 1)[0]
    indexed = take(train_loader(data, spec(24, augment=False), fake_tokenizer), 1)[0]
    assert {*zip(streamed.ids, streamed.captions, streamed.image_ids.tolist(), strict=True)} == {
        *zip(indexed.ids, indexed.captions, indexed.image_ids.tolist(), strict=True)
    }
    pixels = [
        dict(zip(x.ids, (image.numpy().tobytes() for image in x.images), strict=True)) for x in (streamed, indexed)
    ]
    assert pixels[0] == pixels[1]
    whole, worked = (train_loader(data, spec(6, workers=w), fake_tokenizer) for w in (0, 2))
    assert_equal_batches(take(worked, 5), take(whole, 5))
    ranks = [train_loader(data, spec(2, rank=r, world_size=3), fake_tokenizer) for r in range(3)]
    for rank in ranks:
        rank.load_state_dict(whole.state_dict())
    assert [x for rank in ranks for x in take(rank, 1)[0].ids] == take(whole, 1)[0].ids
    again = pickle.loads(pickle.dumps(data.source))
    assert again.all_captions(5) == data.source.all_captions(5) and again.sample_id(5) == data.source.sample_id(5)


def test_an_index_is_made_once_whole_and_refused_when_it_is_stale(tmp_path: Path, monkeypatch: Any) -> None:
    pattern = write_shards(tmp_path / "shards", 2, 3)
    shards, folder = expand_shards(pattern, "data"), tmp_path / "deep/index"
    open_index(folder, shards)
    monkeypatch.setattr("mmcore.data.sources.shard_index._write", lambda *_: pytest.fail("made twice"))
    assert len(open_index(folder, shards)) == 6
    assert sorted(os.listdir(folder)) == ["index.json", "key_ends.npy", "keys.npy", "places.npy"]
    assert sorted(os.listdir(folder.parent)) == [".index.lock", "index"]
    refuses("must be of the 1 shards of --data, got .* of 2 others", open_index, folder, shards[:1])
    os.utime(shards[1], ns=(0, 0))
    refuses("1 of 2 changed since it was made, the first is 001.tar: remove it", open_index, folder, shards)
    (folder / "index.json").write_text("{")
    refuses("shard_index must be a new folder or an index of shards", open_index, folder, shards)
    refuses("shard_index must be of shards that are files, got 'pipe:x'", open_index, folder, ["pipe:x"])
    monkeypatch.undo()
    (tmp_path / "bad.tar").write_bytes(b"x" * 700)
    refuses(
        "must be an undamaged, uncompressed tar to be indexed",
        open_index,
        tmp_path / "new",
        [str(tmp_path / "bad.tar")],
    )
    assert not (tmp_path / "new").exists()


def test_shards_apart_are_one_source_unless_they_have_weights(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path / "a", 2, 4), write_shards(tmp_path / "b", 2, 6)
    data = f"{first}::{second}"
    assert opened(data).num_train == opened(data, shard_index=tmp_path / "one").num_train == 20
    weighted = opened(data, shard_index=tmp_path / "each", data_weights="1::9", with_replacement=True)
    assert isinstance(weighted.source, Mixed) and sorted(os.listdir(tmp_path / "each")) == [
        ".0.lock",
        ".1.lock",
        "0",
        "1",
    ]
    streamed, indexed = (opened(data, **config) for config in ({}, {"shard_index": tmp_path / "one"}))
    loader = train_loader(indexed, spec(4), fake_tokenizer)
    refuses("--shard-index must be given, or left out", loader.load_state_dict,
            train_loader(streamed, spec(4), fake_tokenizer).state_dict())  # fmt: skip


def test_captions_of_shards_come_from_text_and_metadata_by_weight(tmp_path: Path) -> None:
    members: list[Any] = []
    for i in range(8):
        metadata = {"long": [f"long {i}", f"longer {i}"], "image_id": i // 2} if i != 5 else {"image_id": "x"}
        members += [(f"{i}.png", image_bytes(i)), (f"{i}.json", json.dumps(metadata).encode())]
        members += [(f"{i}.txt", f"short {i}".encode())] if i != 6 else []
    shard = str(write_tar(tmp_path / "0.tar", members))
    keys = {"caption_keys": "txt=1,json.long=3", "max_broken": 0.0}
    for config in ({}, {"shard_index": tmp_path / "index"}):
        data = opened(shard, **keys, **config)
        assert data.num_train == 8 and len(data.captions()) == 7 + 14
        loader = train_loader(data, spec(8, augment=False), fake_tokenizer)
        told = Counter(x.split()[0] for batch in take(loader, 60) for x in batch.captions)
        assert set(told) == {"short", "long", "longer"} and loader.broken == {}
        # of 480, 60 have one text alone, 60 metadata alone, 360 both
        assert abs(told["short"] - (60 + 90)) < 40
    images = opened(shard, **keys, val_data=str(write_tar(tmp_path / "1.tar", members))).val
    assert images is not None and len(images) == 5 and len(images.captions[0]) == 6
    missing = opened(shard, caption_keys="json.long", shard_index=tmp_path / "index", max_broken=0.5)
    loader = train_loader(missing, spec(4), fake_tokenizer)
    take(loader, 2)
    assert set(loader.broken) == {"no json.long"}
    for wrong in ("title", "json.", "json"):
        refuses(f"caption_keys of shards must be txt, or json.x .* got '{wrong}'", opened, shard, caption_keys=wrong)


@pytest.mark.parametrize(("config", "sentence"), [
    ({"data": "digits::pairs"}, "data must be 'digits'"), ({"data": "digits::"}, "data must be 'digits'.* got ''"),
    ({"data": "digits::{tar}"}, "must hold captions in random access .* with --shard-index"),
    ({"data": "digits::emoji", "val_fraction": 0.5}, "val_fraction=0.5 has no effect on a mix of sources"),
    ({"data": "digits::{csv}", "style": "noto"}, "style='noto' has no effect on 'digits::"),
    ({"data": "digits::{csv}", "val_data": "{csv}"}, "val_data must not be among the sources"),
    ({"data": "digits::{csv}", "data_weights": "1::2"}, "data_weights must be given with with_replacement"),
    ({"data": "digits::{csv}", "data_weights": "1", "with_replacement": True}, "one for each of 2 sources .* got '1'"),
    ({"data": "digits::{csv}", "data_weights": "1::0", "with_replacement": True}, "got '1::0'"),
    ({"data": "{tar}", "with_replacement": True}, r"captions in random access \(of shards, with shard_index\)"),
    ({"data": "{tar}", "shard_index": "x", "num_samples": 5}, "num_samples=5 has no effect on"),
])  # fmt: skip
def test_what_does_not_fit_a_mix_is_one_sentence(config: dict, sentence: str, tmp_path: Path) -> None:
    names = {
        "csv": write_pairs(tmp_path / "t", 5),
        "tar": write_shards(tmp_path / "s", 1, 4).replace("{000..000}", "000"),
    }
    config = {key: value.format(**names) if isinstance(value, str) else value for key, value in config.items()}
    if "shard_index" in config:
        config["shard_index"] = tmp_path / "index"
    refuses(sentence, opened, **config)


def test_conversations_are_of_one_source(tmp_path: Path) -> None:
    refuses("data must be one source of conversations", open_chats, DataConfig("digits::emoji"), seed=0)
    refuses(
        "with_replacement=True has no effect on conversations",
        open_chats,
        DataConfig("digits", with_replacement=True),
        seed=0,
    )
