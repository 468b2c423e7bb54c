"""`mmcore train blip2-stage1`, `eval` and `export` as a user meets them, in processes of their own."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmcore import checkpoint
from mmcore.systems.blip2.retrieval import load_run
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.clip.weights import save_clip
from tests.distributed.launch import free_port
from tests.systems.clip.test_cli import losses, run

TRAIN = ["train", "blip2-stage1", "--steps", 4, "--save-every", 2, "--eval-every", 3, "--log-every", 1]
SMALL = [*TRAIN, "--batch-size", 32, "--lr", "1e-3", "--ema", "0.9", "--val-fraction", "0.02"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights."""
    folder = tmp_path_factory.mktemp("tower") / "clip"
    torch.manual_seed(0)
    save_clip(CLIP(CLIP_CONFIGS["tiny"]), folder)
    return folder


@pytest.fixture(scope="module")
def finished(tower: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(*SMALL, "--vision", tower, "--out", folder).stdout


def test_a_run_prints_what_it_measured_and_leaves_what_it_names(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "ITM accuracy (held-out): " in printed and "R@10" in printed
    for name in ("metrics.jsonl", "curves.png", "checkpoints/step-00000004"):
        assert str(folder / name) in printed and (folder / name).exists()
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    measured = run("eval", "retrieval", folder).stdout
    assert measured.splitlines()[0] == next(x for x in printed.splitlines() if x.startswith("ITM"))


def test_the_frozen_tower_is_kept_beside_the_checkpoints_as_it_was(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    frozen, last = load_file(folder / "frozen.safetensors"), folder / "checkpoints/step-00000004"
    for key in ("weight", "exp_avg", "ema"):
        names = {name for name, _ in checkpoint.tensors(last, key)}
        assert names and not any(name.startswith("visual.") for name in names)
    model = load_run(folder).model
    for name, x in model.visual.state_dict().items():
        assert torch.equal(x, frozen[f"visual.{name}"])


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_without_the_tower_it_came_from(
    finished: tuple[Path, str], tower: Path, tmp_path: Path
) -> None:
    folder, _ = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    run(*SMALL, "--vision", tower.with_name("gone"), "--out", again, "--resume", "latest")
    assert losses(again) == losses(folder)
    for key in ("weight", "ema"):
        expected = dict(checkpoint.tensors(folder / "checkpoints/step-00000004", key))
        for name, x in checkpoint.tensors(again / "checkpoints/step-00000004", key):
            assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_train_on_the_whole_batch(zero: int, tower: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "-m", "mmcore.train"]
    arguments = [*SMALL[1:], "--batch-size", 16, "--vision", tower, "--zero", zero, "--out", tmp_path / "run"]
    printed = run(*arguments, launcher=torchrun)
    assert f"4 steps of 32 pairs, ZeRO {zero}, fp32, 2 ranks" in printed.stderr
    assert "ITM accuracy (held-out): " in printed.stdout and sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_tower_that_is_trained_too_needs_no_weights_and_exports(tmp_path: Path) -> None:
    run(*SMALL, "--no-freeze-vision", "--steps", 2, "--out", tmp_path / "run")
    assert not (tmp_path / "run/frozen.safetensors").exists()
    start = CLIP_CONFIGS["tiny"]
    assert load_run(tmp_path / "run").model.config.vision.width == start.vision.width
    refused = run("export", tmp_path / "run", "--out", tmp_path / "hf", code=2)
    assert "save_blip2: model must have EVA's tower" in refused.stderr and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--vision must be given, or --no-freeze-vision"),
        (["--no-freeze-vision", "--accum", 2], "--accum must be 1 with blip2-stage1, got 2"),
        (["--no-freeze-vision", "--max-text", 65], "--max-text must be from 2 to 64, got 65"),
        (["--no-freeze-vision", "--model", "tinny"], "did you mean 'tiny'?"),
        (["--no-freeze-vision", "--tokenizer", "missing"], "load_wordpiece: path must be vocab.txt"),
        (["--vision", "missing"], "path must be a weights file or a folder"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(
    arguments: list[object], message: str, tmp_path: Path
) -> None:
    done = run("train", "blip2-stage1", "--out", tmp_path / "run", *arguments, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
