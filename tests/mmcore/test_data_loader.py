"""Order, resumption, ranks and workers of the training loaders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmcore.data import IMAGE_MEAN, IMAGE_STD, DataConfig, LoaderSpec, PairData, open_data
from tests.mmcore.data_fixtures import (
    assert_equal_batches,
    digest,
    fake_tokenizer,
    image_bytes,
    spec,
    take,
    write_coco,
    write_lavis,
    write_pairs,
    write_shards,
    write_stamps,
    write_table,
)

SOURCES = ("digits", "stamps", "csv", "lavis", "coco", "shards")
MAP_SOURCES = ("digits", "stamps", "csv", "lavis", "coco")


def _open(kind: str, folder: Path, **config) -> PairData:
    if kind == "digits":
        return open_data(DataConfig(**config), seed=0)
    if kind == "stamps":
        return open_data(DataConfig(data="stamps", stamps_dir=write_stamps(folder / "st"), **config), seed=0)
    if kind == "csv":
        return open_data(DataConfig(data=write_pairs(folder, 17), **config), seed=0)
    if kind in ("lavis", "coco"):
        write = write_lavis if kind == "lavis" else write_coco
        return open_data(DataConfig(data=write(folder, 17), **config), seed=0)
    return open_data(DataConfig(data=write_shards(folder, 5, 6), **config), seed=0)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_after_a_resume_equal_those_of_the_unbroken_run(
    kind: str, workers: int, tmp_path: Path
) -> None:
    data = _open(kind, tmp_path)
    unbroken = data.train_loader(spec(3, workers=workers), fake_tokenizer)
    # Digits have 479 steps an epoch, the others pass the end of one here.
    take(unbroken, 5)
    state = json.loads(json.dumps(unbroken.state_dict()))
    want = take(unbroken, 12)
    resumed = data.train_loader(spec(3, workers=workers), fake_tokenizer)
    resumed.load_state_dict(state)
    assert_equal_batches(take(resumed, 12), want)
    assert resumed.state_dict() == unbroken.state_dict()
    unbroken.load_state_dict(state)
    assert_equal_batches(take(unbroken, 12), want)


@pytest.mark.parametrize("kind", SOURCES)
def test_another_seed_gives_other_batches(kind: str, tmp_path: Path) -> None:
    data = _open(kind, tmp_path)
    one, other = (next(data.train_loader(spec(4, seed=s), fake_tokenizer)) for s in (0, 1))
    assert one.ids != other.ids


@pytest.mark.parametrize("kind", MAP_SOURCES)
def test_batches_do_not_depend_on_workers(kind: str, tmp_path: Path) -> None:
    data = _open(kind, tmp_path)
    here = take(data.train_loader(spec(3), fake_tokenizer), 8)
    assert_equal_batches(take(data.train_loader(spec(3, workers=2), fake_tokenizer), 8), here)


@pytest.mark.parametrize("kind", MAP_SOURCES)
def test_ranks_together_see_the_batch_of_one_rank(kind: str, tmp_path: Path) -> None:
    data = _open(kind, tmp_path)
    alone = take(data.train_loader(spec(6), fake_tokenizer), 5)
    ranks = [take(data.train_loader(spec(2, rank, 3), fake_tokenizer), 5) for rank in range(3)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert whole.ids == [i for part in parts for i in part.ids]
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
        assert torch.equal(whole.image_ids, torch.cat([part.image_ids for part in parts]))
        assert whole.captions == [c for part in parts for c in part.captions]


@pytest.mark.parametrize("kind", MAP_SOURCES)
def test_a_state_of_one_rank_resumes_another_number_of_ranks(kind: str, tmp_path: Path) -> None:
    data = _open(kind, tmp_path)
    alone = data.train_loader(spec(6), fake_tokenizer)
    assert not alone.state_is_per_rank
    take(alone, 2)
    state = alone.state_dict()
    whole = next(alone)
    for rank in range(2):
        loader = data.train_loader(spec(3, rank, 2), fake_tokenizer)
        loader.load_state_dict(state)
        assert next(loader).ids == whole.ids[3 * rank : 3 * rank + 3]


@pytest.mark.parametrize("kind", MAP_SOURCES)
def test_an_epoch_has_each_sample_at_most_once_and_drops_the_rest(kind: str, tmp_path: Path) -> None:
    data = _open(kind, tmp_path)
    loader = data.train_loader(spec(4), fake_tokenizer)
    assert loader.steps_per_epoch == data.num_train // 4
    first, second = (take(loader, loader.steps_per_epoch) for _ in range(2))
    for epoch, batches in enumerate((first, second)):
        ids = [i for batch in batches for i in batch.ids]
        assert len(set(ids)) == len(ids) == loader.steps_per_epoch * 4
        assert {batch.epoch for batch in batches} == {epoch}
    assert [b.ids for b in first] != [b.ids for b in second]


def test_augmentation_changes_with_the_epoch_and_can_be_turned_off(tmp_path: Path) -> None:
    data = open_data(DataConfig(data=write_pairs(tmp_path, 17, (90, 100)), val_fraction=0.0), seed=0)
    for augment in (True, False):
        loader = data.train_loader(spec(17, augment=augment), fake_tokenizer)
        epochs = [dict(zip(batch.ids, batch.images, strict=True)) for batch in take(loader, 2)]
        equal = [torch.equal(image, epochs[1][name]) for name, image in epochs[0].items()]
        assert not any(equal) if augment else all(equal)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_batch_is_full_and_typed(kind: str, tmp_path: Path) -> None:
    batch = next(_open(kind, tmp_path).train_loader(spec(5, image_size=12), fake_tokenizer))
    assert batch.images.shape == (5, 3, 12, 12)
    assert batch.images.dtype == torch.float32
    assert batch.tokens.shape == (5, 2)
    assert batch.tokens.dtype == batch.labels.dtype == batch.image_ids.dtype == torch.int64
    assert batch.labels.shape == batch.image_ids.shape == (5,)
    assert len(batch.ids) == len(batch.captions) == 5
    assert torch.equal(batch.tokens, fake_tokenizer(batch.captions))
    assert batch.questions is None
    pixels = batch.images * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    # float32 rounding of (x - mean) / std and back, values up to 1: two roundings each way.
    assert pixels.min() >= -4e-7
    assert pixels.max() <= 1 + 4e-7


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_numbers_alone(workers: int, tmp_path: Path) -> None:
    loader = _open("csv", tmp_path).train_loader(spec(2, workers=workers), fake_tokenizer)
    before = torch.get_rng_state()
    take(loader, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", MAP_SOURCES)
def test_the_view_of_a_sample_in_an_epoch_does_not_depend_on_the_batch_size(
    kind: str, tmp_path: Path
) -> None:
    data = _open(kind, tmp_path)
    views = []
    for batch_size in (2, 5):
        batches = take(data.train_loader(spec(batch_size), fake_tokenizer), 10 // batch_size)
        views.append({i: (x, t.tolist()) for b in batches for i, x, t in zip(b.ids, b.images, b.tokens)})
    assert views[0].keys() == views[1].keys()
    for name, (image, tokens) in views[0].items():
        assert torch.equal(image, views[1][name][0])
        assert tokens == views[1][name][1]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_has_one_image_id_on_all_ranks_and_in_all_epochs(
    kind: str, workers: int, tmp_path: Path
) -> None:
    data = _open(kind, tmp_path)
    of_sample: dict[str, set[int]] = {}
    for rank in range(2):
        loader = data.train_loader(spec(2, rank, 2, workers=workers), None)
        for batch in take(loader, 2 * min(loader.steps_per_epoch, 20)):
            for name, image_id in zip(batch.ids, batch.image_ids.tolist(), strict=True):
                of_sample.setdefault(name, set()).add(image_id)
    assert all(len(found) == 1 for found in of_sample.values())
    # Each sample of these sources shows an image of its own.
    assert len(set.union(*of_sample.values())) == len(of_sample)


@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_without_a_tokenizer_captions_come_as_text_alone(kind: str, tmp_path: Path) -> None:
    data = _open(kind, tmp_path)
    batch = next(data.train_loader(spec(3), None))
    assert batch.tokens.shape == (3, 0)
    assert batch.tokens.dtype == torch.int64
    assert set(batch.captions) <= set(data.captions())


_DIGEST = """
import sys
from mmcore.data import DataConfig, open_data
from tests.mmcore.data_fixtures import digest, fake_tokenizer, spec
for data in sys.argv[1:]:
    print(digest(open_data(DataConfig(data=data), seed=0).train_loader(spec(3), fake_tokenizer), 6))
"""


def test_another_process_gets_the_same_batches(tmp_path: Path) -> None:
    names = ["digits", write_pairs(tmp_path, 17), write_coco(tmp_path, 17), write_shards(tmp_path, 3, 6)]
    here = [
        digest(open_data(DataConfig(data=n), seed=0).train_loader(spec(3), fake_tokenizer), 6) for n in names
    ]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    there = subprocess.run(
        [sys.executable, "-c", _DIGEST, *names], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.split() == here


def test_a_broken_image_is_replaced_from_outside_its_batch(tmp_path: Path) -> None:
    table = write_pairs(tmp_path, 40)
    broken = {"3.png", "17.png"}
    for name in broken:
        (tmp_path / "images" / name).write_bytes(image_bytes(0)[:60])
    data = open_data(DataConfig(data=table, val_fraction=0.0, max_broken=0.2), seed=0)
    sound = {str(tmp_path / "images" / f"{i}.png") for i in range(40)}
    loader = data.train_loader(spec(8), fake_tokenizer)
    for batch in take(loader, 2 * loader.steps_per_epoch):
        assert len(set(batch.ids)) == 8
        assert set(batch.ids) <= sound - {str(tmp_path / "images" / name) for name in broken}
    assert loader.broken == {"damaged image": 4}
    ranks = [data.train_loader(spec(4, rank, 2), fake_tokenizer) for rank in range(2)]
    again = data.train_loader(spec(8), fake_tokenizer)
    for _ in range(5):
        assert next(again).ids == next(ranks[0]).ids + next(ranks[1]).ids


def test_a_batch_as_large_as_the_data_fills_the_place_of_a_broken_image(tmp_path: Path) -> None:
    table = write_pairs(tmp_path, 5)
    (tmp_path / "images" / "2.png").write_bytes(b"")
    data = open_data(DataConfig(data=table, val_fraction=0.0, max_broken=0.5), seed=0)
    batch = next(data.train_loader(spec(5), fake_tokenizer))
    assert len(batch.ids) == 5
    assert len(set(batch.ids)) == 4


def test_equal_captions_have_equal_labels_and_digits_of_a_class_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    rows = [["filepath", "title"], *(["a.png", caption] for caption in ("cat", "dog", "cat", "cow"))]
    data = open_data(DataConfig(data=write_table(tmp_path, rows), val_fraction=0.0), seed=0)
    batch = next(data.train_loader(spec(4), fake_tokenizer))
    same_caption = (batch.tokens[:, None] == batch.tokens[None]).all(-1)
    assert torch.equal(batch.labels[:, None] == batch.labels[None], same_caption)
    assert same_caption.sum() == 6
    digits = next(open_data(DataConfig(), seed=0).train_loader(spec(64), fake_tokenizer))
    assert set(digits.labels.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 9}, "seed"), ({"batch_size": 5}, "global_batch"), ({"world_size": 2}, "global_batch")],
)
def test_a_state_of_other_settings_is_refused(change: dict, name: str, tmp_path: Path) -> None:
    data = _open("csv", tmp_path)
    state = data.train_loader(spec(4), fake_tokenizer).state_dict()
    with pytest.raises(ValueError, match=f"{name} must be that of the run to resume"):
        data.train_loader(spec(**{"batch_size": 4, **change}), fake_tokenizer).load_state_dict(state)


def test_a_state_of_shards_belongs_to_its_rank(tmp_path: Path) -> None:
    data = _open("shards", tmp_path)
    loader = data.train_loader(spec(2, 0, 2), fake_tokenizer)
    assert loader.state_is_per_rank
    with pytest.raises(ValueError, match="rank must be that of the run to resume"):
        data.train_loader(spec(2, 1, 2), fake_tokenizer).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("kind", SOURCES)
def test_a_batch_larger_than_the_data_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the global batch .* must be at most .*, got 4000"):
        _open(kind, tmp_path).train_loader(spec(2000, 0, 2), fake_tokenizer)


def test_a_tokenizer_that_breaks_its_contract_is_refused(tmp_path: Path) -> None:
    loader = _open("csv", tmp_path).train_loader(spec(3), lambda captions: fake_tokenizer(captions).float())
    with pytest.raises(ValueError, match=r"tokenizer must return int64 \[3, T\], got torch.float32 \[3, 2\]"):
        next(loader)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 0),
        ("batch_size", 0),
        ("world_size", 0),
        ("seed", -1),
        ("workers", -1),
        ("rank", 1),
        ("rank", -1),
    ],
)
def test_a_loader_spec_out_of_range_is_refused(name: str, value: int) -> None:
    good = {"image_size": 8, "batch_size": 2, "rank": 0, "world_size": 1, "seed": 0}
    with pytest.raises(ValueError, match=f"data: {name} must be .*got {value}"):
        LoaderSpec(**{**good, name: value})  # pyright: ignore[reportArgumentType]
