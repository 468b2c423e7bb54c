"""`mmcore train clip`, `eval` and `export` as a user meets them, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel

from mmcore import checkpoint
from mmcore.data import normalized
from mmcore.runs import read_run
from tests.distributed.launch import environment, free_port
from tests.mmcore.data_fixtures import write_pairs, write_shards
from tests.processes import ROOT
from tests.systems.cli import MMCORE, losses, run

SMALL = ["--batch-size", "64", "--lr", "1e-3", "--ema", "0.9", "--log-every", "1", "--save-every", "2"]


def torchrun() -> list[str]:
    options = ["--nproc_per_node=2", f"--master_port={free_port()}", "-m", "mmcore.train"]
    return [sys.executable, "-m", "torch.distributed.run", *options]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An unbroken run of 12 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run("train", "clip", "--out", folder, "--steps", 12, *SMALL).stdout


def test_a_run_prints_its_accuracy_leaves_what_it_names_and_eval_measures_the_same(finished):
    folder, printed = finished
    named = [Path(line.strip()) for line in printed.splitlines() if line.startswith("  ") and "/" in line]
    assert {p.name for p in named} >= {"metrics.jsonl", "curves.png", "retrieval.png", "step-00000012"}
    assert all(path.exists() for path in named)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(losses(folder)) == list(range(1, 13))
    line = next(x for x in printed.splitlines() if x.startswith("zero-shot accuracy (held-out): "))
    assert line in run("eval", "zeroshot", folder).stdout
    assert "R@10" in run("eval", "retrieval", folder, "--weights", "weight").stdout


def test_export_is_what_transformers_loads(finished, tmp_path):
    folder, _ = finished
    run("export", folder, "--out", tmp_path / "hf")
    theirs = CLIPModel.from_pretrained(tmp_path / "hf").eval()
    ours: Any = read_run(folder)
    val = ours.recipe.open_data().val
    wanted = ours.assets.preprocess
    images = normalized(next(val.batches(4, wanted))[0], wanted.mean, wanted.std)
    tokens = ours.assets.tokenizer(["a scan of the digit three", "a handwritten nine"])
    prepare = CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
    scans = [val.raw_image(i) for i in range(4)]
    pixels = prepare(scans, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    torch.testing.assert_close(pixels, images, atol=0.02, rtol=0)  # one grey level of 255, normalised
    with torch.no_grad():
        image, text, scale = ours.model(images, tokens)
        found = theirs(pixel_values=images, input_ids=tokens).logits_per_image
    torch.testing.assert_close(found, scale * image @ text.T, atol=1e-4, rtol=1e-4)
    run("export", folder, "--out", tmp_path / "open_clip", "--format", "open_clip")
    assert (tmp_path / "open_clip/open_clip_model.safetensors").is_file()
    assert "Traceback" not in run("export", folder, "--out", tmp_path / "hf", code=2).stderr


def test_a_run_killed_before_its_first_checkpoint_and_twice_after_it_resumes_to_the_same_losses(finished, tmp_path):
    folder = tmp_path / "killed"
    arguments = ["train", "clip", "--out", folder, "--steps", 12, "--resume", "latest", *SMALL]
    for wanted in (1, 5, 9):
        process = subprocess.Popen(
            [*MMCORE, *map(str, arguments)], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        metrics = folder / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= wanted:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = checkpoint.steps(folder / "checkpoints")
        assert not found if wanted == 1 else 0 < found[-1] < 12, "killed too late to prove anything"
    run(*arguments)
    assert losses(folder) == losses(finished[0])
    whole, resumed = (checkpoint.find(f) for f in (finished[0], folder))
    for key in ("weight", "ema", "exp_avg"):
        expected = dict(checkpoint.tensors(whole, key))
        for name, value in checkpoint.tensors(resumed, key):
            assert torch.equal(value, expected[name]), (key, name)


def test_finished_run_is_not_overwritten_and_resuming_it_trains_no_more(finished):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    refused = run("train", "clip", "--out", folder, "--steps", 12, *SMALL, code=2)
    assert "must be a new folder" in refused.stderr and "Traceback" not in refused.stderr
    run("train", "clip", "--out", folder, "--steps", 12, "--resume", "latest", *SMALL)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_two_ranks_of_half_the_batch_train_as_one_process_under_deepspeeds_launcher_and_torchs(tmp_path):
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, **auto}))
    half = ["--batch-size", 16, "--accum", 2, "--activation-checkpointing", "--steps", 4, *SMALL[2:]]
    whole = ["--batch-size", 64, "--steps", 4, *SMALL[2:]]
    run("train", "clip", "--out", tmp_path / "one", *whole)
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", f"--master_port={free_port()}"]
    starts = {
        "deepspeed": ([*deepspeed, "--module", "mmcore.train"], ["--deepspeed", tmp_path / "zero3.json"]),
        "torchrun": (torchrun(), ["--zero", 2]),
    }
    one = losses(tmp_path / "one")
    for name, (launcher, zero) in starts.items():
        run("clip", "--out", tmp_path / name, *half, *zero, launcher=launcher)
        assert losses(tmp_path / name) == pytest.approx(one, abs=1e-4), name
    resumed = run("train", "clip", "--out", tmp_path / "deepspeed", "--resume", "latest", *whole)
    assert "zero-shot accuracy (held-out)" in resumed.stdout


def test_shards_and_tables_train_through_the_same_command(tmp_path):
    options = ["--batch-size", 4, "--steps", 4, "--log-every", 1]
    pattern = write_shards(tmp_path / "shards", 4, 8)
    train, held_out = pattern.replace("..003", "..002"), pattern.replace("{000..003}", "003")
    run("train", "clip", "--data", train, "--val-data", held_out, "--out", tmp_path / "of shards", *options)
    assert sorted(losses(tmp_path / "of shards")) == [1, 2, 3, 4]
    table = write_pairs(tmp_path, 24)
    printed = run("train", "clip", "--data", table, "--out", tmp_path / "of table", *options).stdout
    assert "text to image: R@1" in printed and "zero-shot" not in printed
    refused = run("eval", "zeroshot", tmp_path / "of table", code=2)
    assert "has no classes to tell apart" in refused.stderr
    wrong = run("train", "clip", "--data", table, "--csv-img-key", "image", "--out", tmp_path / "no", code=2)
    assert "filepath" in wrong.stderr
    single = write_shards(tmp_path / "one", 1, 16)
    done = run("clip", "--data", single, "--out", tmp_path / "no", *options, launcher=torchrun(), code=1)
    assert "must be at most the 1 shards" in done.stderr and not (tmp_path / "no").exists()


def test_exported_weights_are_a_start_for_another_run(finished, tmp_path):
    run("export", finished[0], "--out", tmp_path / "hf")
    options = ["--init", tmp_path / "hf", "--tokenizer", tmp_path / "hf", "--steps", 1, "--lr", "1e-9", *SMALL[4:]]
    printed = run("train", "clip", *options, "--batch-size", 64, "--out", tmp_path / "run").stdout
    line = next(x for x in finished[1].splitlines() if x.startswith("zero-shot accuracy"))
    assert line in printed


def test_a_loss_that_explodes_stops_the_run_and_says_what_to_look_at(tmp_path):
    folder = tmp_path / "exploded"
    options = ["--batch-size", "64", "--lr", "1e38", "--warmup", "0", "--steps", "8", "--log-every", "1"]
    stopped = run("train", "clip", "--out", folder, *options, code=1)
    assert "the run stops and saves nothing more. Look at --lr" in stopped.stderr
    assert "Traceback" not in stopped.stderr and all(loss == loss for loss in losses(folder).values())
