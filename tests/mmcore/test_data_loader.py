"""Order, resumption, ranks and workers of the training loaders."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.data import DataConfig, LoaderSpec, open_data
from mmcore.data.loader import Payload, copied_ahead, num_workers
from tests.mmcore.data_fixtures import (
    assert_equal_batches,
    digest,
    fake_tokenizer,
    image_bytes,
    opened,
    opened_kind,
    question_loader,
    spec,
    take,
    train_loader,
    write_coco,
    write_pairs,
    write_shards,
    write_table,
)
from tests.refusals import refuses

MAP_SOURCES = ("digits", "stamps", "csv", "lavis", "coco")
SOURCES = (*MAP_SOURCES, "shards")
# a source, and what of it is read
READS = [(source, train_loader) for source in MAP_SOURCES]
READS += [(source, question_loader) for source in ("digits", "stamps", "vqa", "lavis questions")]


@pytest.mark.parametrize(("kind", "loader_of"), [*READS, ("shards", train_loader)])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_after_a_resume_equal_those_of_the_unbroken_run(kind: str, loader_of: Any, workers: int, tmp_path):
    data = opened_kind(kind, tmp_path, max_broken=0.5)
    if kind == "coco":
        (tmp_path / "3.jpg").write_bytes(b"broken")
    unbroken = loader_of(data, spec(3, workers=workers), fake_tokenizer)
    # Digits have 479 steps an epoch, the others pass the end of one here.
    take(unbroken, 5)
    state = json.loads(json.dumps(unbroken.state_dict()))
    want = take(unbroken, 12)
    resumed = loader_of(data, spec(3, workers=workers), fake_tokenizer)
    resumed.load_state_dict(state)
    assert_equal_batches(take(resumed, 12), want)
    assert resumed.state_dict() == unbroken.state_dict() and resumed.broken == unbroken.broken
    assert set(resumed.broken) == ({"not an image"} if kind == "coco" else set())
    unbroken.load_state_dict(state)
    assert_equal_batches(take(unbroken, 12), want)


@pytest.mark.parametrize("kind", MAP_SOURCES)
def test_an_epoch_has_each_sample_at_most_once_and_drops_the_rest(kind: str, tmp_path: Path) -> None:
    data = opened_kind(kind, tmp_path)
    loader = train_loader(data, spec(4), fake_tokenizer)
    assert loader.steps_per_epoch == data.num_train // 4
    first, second = (take(loader, loader.steps_per_epoch) for _ in range(2))
    for epoch, batches in enumerate((first, second)):
        ids = [i for batch in batches for i in batch.ids]
        assert len(set(ids)) == len(ids) == loader.steps_per_epoch * 4
        assert {batch.epoch for batch in batches} == {epoch}
    assert [b.ids for b in first] != [b.ids for b in second]


def test_augmentation_changes_with_the_epoch_and_can_be_turned_off(tmp_path: Path) -> None:
    data = opened(write_pairs(tmp_path, 17, (90, 100)), val_fraction=0.0)
    for augment in (True, False):
        loader = train_loader(data, spec(17, augment=augment), fake_tokenizer)
        epochs = [dict(zip(batch.ids, batch.images, strict=True)) for batch in take(loader, 2)]
        equal = [torch.equal(image, epochs[1][name]) for name, image in epochs[0].items()]
        assert not any(equal) if augment else all(equal)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_numbers_alone(workers: int, tmp_path: Path) -> None:
    loader = train_loader(opened_kind("csv", tmp_path), spec(2, workers=workers), fake_tokenizer)
    before = torch.get_rng_state()
    take(loader, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", MAP_SOURCES)
def test_the_view_of_a_sample_in_an_epoch_does_not_depend_on_the_batch_size(kind: str, tmp_path: Path) -> None:
    data = opened_kind(kind, tmp_path)
    views = []
    for batch_size in (2, 5):
        batches = take(train_loader(data, spec(batch_size), fake_tokenizer), 10 // batch_size)
        views.append({i: (x, t.tolist()) for b in batches for i, x, t in zip(b.ids, b.images, b.tokens)})
    assert views[0].keys() == views[1].keys()
    for name, (image, tokens) in views[0].items():
        assert torch.equal(image, views[1][name][0]) and tokens == views[1][name][1]


_DIGEST = """
import sys
from mmcore.data import DataConfig, open_data
from tests.mmcore.data_fixtures import digest, fake_tokenizer, spec, train_loader
for data in sys.argv[1:]:
    print(digest(train_loader(open_data(DataConfig(data=data), seed=0), spec(3), fake_tokenizer), 6))
"""


def test_another_process_gets_the_same_batches(tmp_path: Path) -> None:
    names = ["digits", write_pairs(tmp_path, 17), write_coco(tmp_path, 17), write_shards(tmp_path, 3, 6)]
    here = [digest(train_loader(opened(n), spec(3), fake_tokenizer), 6) for n in names]
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
    data = opened(table, val_fraction=0.0, max_broken=0.2)
    sound = {str(tmp_path / "images" / f"{i}.png") for i in range(40)}
    loader = train_loader(data, spec(8), fake_tokenizer)
    for batch in take(loader, 2 * loader.steps_per_epoch):
        assert len(set(batch.ids)) == 8
        assert set(batch.ids) <= sound - {str(tmp_path / "images" / name) for name in broken}
    assert loader.broken == {"damaged image": 4}
    ranks = [train_loader(data, spec(4, rank, 2), fake_tokenizer) for rank in range(2)]
    again = train_loader(data, spec(8), fake_tokenizer)
    for _ in range(5):
        assert next(again).ids == next(ranks[0]).ids + next(ranks[1]).ids
    whole = next(train_loader(data, spec(40), fake_tokenizer))  # as large as the data
    assert len(whole.ids) == 40 and len(set(whole.ids)) == 38


def test_equal_captions_have_equal_labels_and_digits_of_a_class_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    rows = [["filepath", "title"], *(["a.png", caption] for caption in ("cat", "dog", "cat", "cow"))]
    data = opened(write_table(tmp_path, rows), val_fraction=0.0)
    batch = next(train_loader(data, spec(4), fake_tokenizer))
    same_caption = (batch.tokens[:, None] == batch.tokens[None]).all(-1)
    assert torch.equal(batch.labels[:, None] == batch.labels[None], same_caption) and same_caption.sum() == 6
    digits = next(train_loader(opened("digits"), spec(64), fake_tokenizer))
    assert set(digits.labels.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("world_size", 0), ("seed", -1), ("workers", -1), ("rank", 1), ("rank", -1)]
)
def test_a_loader_spec_out_of_range_is_refused(name: str, value: int) -> None:
    good = {"batch_size": 2, "rank": 0, "world_size": 1, "seed": 0}
    with pytest.raises(ValueError, match=f"data: {name} must be .*got {value}"):
        LoaderSpec(**{**good, name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("kind", "loader_of"), READS)
def test_batches_are_those_of_one_rank_whatever_the_workers_and_the_ranks(kind: str, loader_of: Any, tmp_path: Path):
    data = opened_kind(kind, tmp_path)
    loader = loader_of(data, spec(6), fake_tokenizer)
    states, alone = [], []
    for _ in range(5):
        states.append(loader.state_dict())
        alone.append(next(loader))
    assert_equal_batches(take(loader_of(data, spec(6, workers=2), fake_tokenizer), 5), alone)
    ranks = [take(loader_of(data, spec(2, rank, 3), fake_tokenizer), 5) for rank in range(3)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        for key in ("ids", "captions", "questions"):
            assert list(getattr(whole, key) or ()) == [x for part in parts for x in getattr(part, key) or ()], key
        for key in ("images", "tokens", "labels", "image_ids"):
            assert torch.equal(getattr(whole, key), torch.cat([getattr(part, key) for part in parts])), key
    for rank in range(2):  # a run of one rank goes on on two
        loader = loader_of(data, spec(3, rank, 2), fake_tokenizer)
        loader.load_state_dict(states[2])
        assert next(loader).ids == alone[2].ids[3 * rank : 3 * rank + 3]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_batch_is_full_typed_and_of_its_seed(kind: str, tmp_path: Path) -> None:
    data = opened_kind(kind, tmp_path)
    batch = next(train_loader(data, spec(5, image_size=12), fake_tokenizer))
    assert batch.images.shape == (5, 3, 12, 12) and batch.images.dtype == torch.uint8
    assert batch.tokens.dtype == batch.labels.dtype == batch.image_ids.dtype == torch.int64
    assert batch.tokens.shape == (5, 2) and batch.labels.shape == batch.image_ids.shape == (5,)
    assert len(batch.ids) == len(batch.captions) == 5 and batch.questions is None
    assert torch.equal(batch.tokens, fake_tokenizer(batch.captions))
    assert next(train_loader(data, spec(5, seed=9), fake_tokenizer)).ids != batch.ids
    text = next(train_loader(data, spec(3), None))  # without a tokenizer, alone
    assert (
        text.tokens.shape == (3, 0) and text.tokens.dtype == torch.int64 and set(text.captions) <= set(data.captions())
    )
    refuses(r"the global batch .* must be at most .*, got 4000", train_loader, data, spec(2000, 0, 2), fake_tokenizer)


@pytest.mark.parametrize(("kind", "saved", "change", "name"), [
    ("csv", {}, {"seed": 9}, "seed"), ("csv", {}, {"batch_size": 5}, "global_batch"),
    ("csv", {}, {"world_size": 2}, "global_batch"), ("shards", {"world_size": 2}, {"rank": 1}, "rank"),
])  # fmt: skip
def test_a_state_of_other_settings_or_of_another_ranks_shards_is_refused(kind, saved, change, name, tmp_path: Path):
    data, given = opened_kind(kind, tmp_path), {"batch_size": 4, **saved}
    loader = train_loader(data, spec(**given), fake_tokenizer)
    other = train_loader(data, spec(**given | change), fake_tokenizer)
    refuses(f"{name} must be that of the run to resume", other.load_state_dict, loader.state_dict())


def test_a_tokenizer_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    loader = train_loader(opened_kind("csv", tmp_path), spec(3), lambda captions: fake_tokenizer(captions).float())
    refuses(r"tokenizer must return int64 \[3, T\], got torch.float32 \[3, 2\]", next, loader)


def test_a_gpu_receives_each_micro_batch_while_the_one_before_is_computed_with(monkeypatch) -> None:
    """By a stand-in for the driver: what is asked of it, and in which order."""
    asked: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            asked.append("wait")

    payloads = [Payload(torch.tensor([i]), [str(i)]) for i in range(3)] + [Payload(failure="stop")]
    streams = {"Stream": lambda device: Stream(), "current_stream": lambda device: Stream()}
    for name, fake in (streams | {"stream": lambda stream: nullcontext()}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: asked.append(f"used {x.item()}"))
    read = (asked.append(f"read {i}") or payload for i, payload in enumerate(payloads))
    found = []
    for payload in copied_ahead(read, torch.device("cpu")):
        asked.append("computed")
        found.append(payload.failure or payload.batch.item())
    step = ["wait", "used {}", "read {}", "computed"]
    wanted = [word.format(i if "used" in word else i + 1) for i in range(3) for word in step]
    assert found == [0, 1, 2, "stop"] and asked == ["read 0", *wanted, "computed"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_on_the_host() -> None:
    data = open_data(DataConfig(), seed=0)
    for workers in (0, 2):
        host, device = (train_loader(data, spec(6, workers=workers), fake_tokenizer) for _ in "ab")
        device.loader.device = torch.device("cuda")
        for expected, got in zip(take(host, 4), take(device, 4), strict=True):
            assert got.images.is_cuda and torch.equal(got.images.cpu(), expected.images)


@pytest.mark.parametrize(("cores", "ranks", "wanted"), [(16, 1, 8), (16, 4, 3), (2, 1, 1), (2, 4, 0)])
def test_loading_processes_are_by_default_what_a_ranks_cores_leave_on_a_gpu(cores, ranks, wanted, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert num_workers(LoaderSpec(4, 0, 1, 0)) == 0 and num_workers(LoaderSpec(4, 0, 1, 0, workers=5)) == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert num_workers(LoaderSpec(4, 0, 1, 0)) == wanted
