"""`mmcore train blip2-stage2`, `eval caption|vqa` and `export` as a user meets them, in processes of their own."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from mmcore import checkpoint
from mmcore.parts.language import tiny_language_model, tiny_tokenizer
from mmcore.runs import find_run
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.shapes import blip2_config
from mmcore.systems.blip2.start import blip2_lm_of
from mmcore.systems.blip2.weights import save_blip2
from tests.distributed.launch import free_port
from tests.mmcore.data_fixtures import write_shards
from tests.systems.clip.test_cli import losses, run

TRAIN = ["train", "blip2-stage2", "--steps", 4, "--save-every", 2, "--eval-every", 3, "--log-every", 1]
SMALL = [*TRAIN, "--batch-size", 32, "--lr", "1e-3", "--ema", "0.9", "--val-fraction", "0.05"]
STATE = ("weight", "exp_avg", "ema")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP-2 of random weights, its tower EVA's."""
    folder = tmp_path_factory.mktemp("start") / "blip2"
    torch.manual_seed(0)
    shape = blip2_config("tiny")
    vision = replace(shape.vision, has_norm_pre=False, has_patch_bias=True, norm_eps=1e-6)
    save_blip2(BLIP2(replace(shape, vision=vision)), folder)
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of random weights, in bfloat16."""
    folder = tmp_path_factory.mktemp("language") / "llama"
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer(
        ["a scan of the digit seven\n", "Question: which digit is this? Answer: two\n"]
    )
    model: Any = tiny_language_model(tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(start: Path, language: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(*SMALL, "--from", start, "--llm", language, "--out", folder).stdout


def test_a_run_prints_what_it_measured_and_leaves_what_it_names(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "captions (held-out), greedy, 90 images: BLEU-4 " in printed
    for name in ("metrics.jsonl", "curves.png", "captions.json", "captions.png", "checkpoints/step-00000004"):
        assert str(folder / name) in printed and (folder / name).exists()
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    results = json.loads((folder / "captions.json").read_text())
    assert [r["image_id"] for r in results] == list(range(90)) and isinstance(results[0]["caption"], str)


def test_what_is_frozen_is_as_it_was_and_in_no_checkpoint(
    finished: tuple[Path, str], start: Path, language: Path
) -> None:
    folder, _ = finished
    for key in STATE:
        names = [name for name, _ in checkpoint.tensors(folder / "checkpoints/step-00000004", key)]
        parts = {name.split(".")[0] for name in names}
        assert parts == {"norm_vision", "qformer", "language_projection"}
        assert not any("text" in name for name in names)
    read = blip2_lm_of(find_run(folder), dtype=None)
    for name, x in load_file(language / "model.safetensors").items():
        assert x.dtype == torch.bfloat16 and torch.equal(read.language_model.state_dict()[name], x)
    tower = load_file(start / "model.safetensors")["vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(read.visual.state_dict()["transformer.blocks.0.mlp.fc1.weight"], tower)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_without_what_it_started_from(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    run(*SMALL, "--out", again, "--resume", "latest")
    assert losses(again) == losses(folder)
    for key in STATE:
        expected = dict(checkpoint.tensors(folder / "checkpoints/step-00000004", key))
        for name, x in checkpoint.tensors(again / "checkpoints/step-00000004", key):
            assert torch.equal(x, expected[name]), name


def test_a_language_model_that_was_moved_is_found_and_another_is_not_taken(
    finished: tuple[Path, str], language: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["model"]["language_model"]["folder"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(saved))
    gone = run("eval", "caption", folder, code=2).stderr
    assert f"must be in {tmp_path / 'gone'}, which is gone: say where by --llm" in gone
    beam = run("eval", "caption", folder, "--llm", language, "--decode", "beam", "--num-beams", 2).stdout
    assert "captions (held-out), beam, 90 images: BLEU-4 " in beam
    shutil.copytree(language, tmp_path / "other")
    weights = load_file(language / "model.safetensors")
    weights["model.norm.weight"][0] = 2
    save_file(weights, tmp_path / "other/model.safetensors", {"format": "pt"})
    other = run("eval", "vqa", folder, "--llm", tmp_path / "other", code=2).stderr
    assert "must be the one it was trained with" in other and "differs in model.safetensors" in other


@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_train_and_export_what_transformers_reads(
    zero: int, start: Path, language: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "-m", "mmcore.train"]
    out = tmp_path / "run"
    inputs = ["--from", start, "--llm", language, "--zero", zero, "--out", out]
    printed = run(*SMALL[1:], "--batch-size", 16, *inputs, launcher=torchrun)
    assert f"4 steps of 32 pairs, ZeRO {zero}, fp32, 2 ranks" in printed.stderr
    assert "captions (held-out)" in printed.stdout and sorted(losses(out)) == [1, 2, 3, 4]
    if zero == 3:
        run("export", out, "--out", tmp_path / "hf")
        processor = Blip2Processor.from_pretrained(tmp_path / "hf")
        model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
        asked = processor(
            images=[torch.rand(3, 30, 20)], text="Question:", return_tensors="pt", do_rescale=False
        )
        assert model.generate(**asked, max_new_tokens=3).shape[0] == 1


def test_a_run_of_stage_1_and_a_language_model_of_its_own(tmp_path: Path) -> None:
    run("train", "blip2-stage1", *SMALL[2:], "--steps", 1, "--no-freeze-vision", "--out", tmp_path / "s1")
    described = run("eval", "caption", tmp_path / "s1", "--decode", "nucleus").stdout
    assert "captions (held-out), nucleus, 90 images: BLEU-4 " in described
    tiny = ["--from", tmp_path / "s1", "--llm", "tiny", "--llm-steps", 2, "--task", "vqa"]
    printed = run(*SMALL, "--steps", 1, *tiny, "--out", tmp_path / "s2").stdout
    assert "a tiny language model (" in printed
    line = next(
        x
        for x in printed.splitlines()
        if x.startswith("VQA accuracy (held-out, derived questions), greedy, 180")
    )
    assert "(majority 25.0 %)" in line
    assert (tmp_path / "s2/answers.png").exists() and (tmp_path / "s2/language_model/config.json").exists()
    answers = json.loads((tmp_path / "s2/answers.json").read_text())
    assert set(answers[0]) == {"question_id", "answer"}
    # a run of stage 2 goes on with another task, and with the same language model
    more = run(*SMALL, "--steps", 1, "--from", tmp_path / "s2", "--out", tmp_path / "s3").stdout
    assert "captions (held-out)" in more and not (tmp_path / "s3/language_model").exists()


def test_both_stages_read_shards(start: Path, language: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    data = [
        "--data",
        write_shards(tmp_path / "train", 2, 8),
        "--val-data",
        write_shards(tmp_path / "val", 1, 6),
    ]
    few = ["--steps", 2, "--batch-size", 8, "--log-every", 1, *data]
    first = run("train", "blip2-stage1", *few, "--no-freeze-vision", "--out", tmp_path / "s1").stdout
    assert "ITM accuracy (held-out)" in first and sorted(losses(tmp_path / "s1")) == [1, 2]
    inputs = ["--from", tmp_path / "s1", "--llm", "tiny", "--llm-steps", 2]
    second = run("train", "blip2-stage2", *few, *inputs, "--out", tmp_path / "s2").stdout
    assert "learned 16 texts" in second and "captions (held-out), greedy, 6 images" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm", "tiny"], "--from must be given: a run of blip2-stage1"),
        (["--from", "START"], "--llm must be a language model's folder or 'tiny'"),
        (["--from", "START", "--llm", "missing"], "load_language_model: folder must hold config.json"),
        (["--from", "missing", "--llm", "tiny"], "load_blip2: folder must hold config.json, got missing"),
        (["--from", "START", "--llm", "tiny", "--accum", 2], "--accum must be 1 with blip2-stage2, got 2"),
        (
            ["--from", "START", "--llm", "LLM", "--llm-steps", 2],
            "--llm-steps must be at least 1 and beside --llm tiny",
        ),
        (["--from", "START", "--llm", "LLM", "--prompt", "a {}"], "--prompt must hold no {}"),
        (["--from", "START", "--llm", "LLM", "--max-text", 1], "max_answer must be at least 2, got 1"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(
    arguments: list[object], message: str, start: Path, language: Path, tmp_path: Path
) -> None:
    places = {"START": start, "LLM": language}
    given = [places.get(str(x), x) for x in arguments]
    done = run("train", "blip2-stage2", "--out", tmp_path / "run", *given, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
