"""`mmcore train blip2-stage1|blip2-stage2`, `eval` and `export` as a user meets them, in processes of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from mmcore import checkpoint
from mmcore.runs import read_run
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from tests.systems.blip2.fixtures import write_start
from tests.systems.cli import losses, run, write_language

SMALL = ["--steps", 4, "--save-every", 2, "--eval-every", 3, "--log-every", 1, "--batch-size", 32, "--lr", "1e-3"]
SMALL += ["--ema", "0.9", "--val-fraction", "0.05"]
STATE, LAST = ("weight", "exp_avg", "ema"), "checkpoints/step-00000004"
Run = tuple[Path, str]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A BLIP-2 to start from, and a language model in bfloat16."""
    folder = tmp_path_factory.mktemp("parts")
    return write_start(folder / "blip2"), write_language(folder / "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def first(tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, run("train", "blip2-stage1", *SMALL, "--vision", tower, "--out", folder).stdout


@pytest.fixture(scope="module")
def second(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, inputs = tmp_path_factory.mktemp("runs") / "second", ["--from", parts[0], "--llm", parts[1]]
    return folder, run("train", "blip2-stage2", *SMALL, *inputs, "--out", folder).stdout


def test_a_run_prints_what_it_measured_and_leaves_what_it_names(first: Run, second: Run) -> None:
    named = ("metrics.jsonl", "curves.png", LAST)
    for (folder, printed), names in ((first, named), (second, (*named, "captions.json", "captions.png"))):
        assert all(str(folder / name) in printed and (folder / name).exists() for name in names)
        assert sorted(losses(folder)) == [1, 2, 3, 4]
    assert "ITM accuracy (held-out): " in first[1] and "R@10" in first[1]
    assert run("eval", "matching", first[0]).stdout in first[1]
    assert run("eval", "retrieval", first[0]).stdout in first[1]
    assert "captions (held-out), greedy, 90 images: BLEU-4 " in second[1]
    results = json.loads((second[0] / "captions.json").read_text())
    assert [r["image_id"] for r in results] == list(range(90)) and isinstance(results[0]["caption"], str)


def test_what_is_frozen_is_as_it_was_and_in_no_checkpoint(first: Run, second: Run, parts: tuple[Path, Path]) -> None:
    for key in STATE:
        names = {name for name, _ in checkpoint.tensors(first[0] / LAST, key)}
        assert names and not any(name.startswith("visual.") for name in names)
        names = {name for name, _ in checkpoint.tensors(second[0] / LAST, key)}
        assert {name.split(".")[0] for name in names} == {"norm_vision", "qformer", "language_projection"}
        assert not any("text" in name for name in names)
    frozen, model = load_file(first[0] / "frozen.safetensors"), read_run(first[0]).model
    for name, x in model.get_submodule("visual").state_dict().items():
        assert torch.equal(x, frozen[f"visual.{name}"])
    read: Any = read_run(second[0], purpose="export").model
    for name, x in load_file(parts[1] / "model.safetensors").items():
        assert x.dtype == torch.bfloat16 and torch.equal(read.language_model.state_dict()[name], x)
    given = load_file(parts[0] / "model.safetensors")["vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(read.visual.state_dict()["transformer.blocks.0.mlp.fc1.weight"], given)


def test_a_language_model_that_was_moved_is_found_and_another_is_not_taken(
    second: Run, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, language = tmp_path / "run", parts[1]
    shutil.copytree(second[0], folder)
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


def test_what_is_exported_is_what_transformers_reads(second: Run, tmp_path: Path) -> None:
    run("export", second[0], "--out", tmp_path / "hf")
    processor = Blip2Processor.from_pretrained(tmp_path / "hf")
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    # an answer ends with a new line, which is not the language model's own end
    stops = sorted(read_run(second[0]).assets.tokens.stops)
    assert len(stops) == 2 and model.language_model.generation_config.eos_token_id == stops
    asked = processor(images=[torch.rand(3, 30, 20)], text="Question:", return_tensors="pt", do_rescale=False)
    assert model.generate(**asked, max_new_tokens=3).shape[0] == 1


def test_a_tower_of_its_own_and_then_a_language_model_of_its_own_are_trained(tmp_path: Path) -> None:
    first, second = tmp_path / "s1", tmp_path / "s2"
    run("train", "blip2-stage1", *SMALL, "--steps", 1, "--no-freeze-vision", "--out", first)
    model: Any = read_run(first).model
    assert model.config.vision.width == CLIP_CONFIGS["tiny"].vision.width
    assert not (first / "frozen.safetensors").exists()
    refused = run("export", first, "--out", tmp_path / "hf", code=2)
    assert "save_blip2: vision.has_norm_pre must be False" in refused.stderr and not (tmp_path / "hf").exists()
    described = run("eval", "caption", first, "--decode", "nucleus").stdout
    assert "captions (held-out), nucleus, 90 images: BLEU-4 " in described
    tiny = ["--from", first, "--llm", "tiny", "--llm-steps", 2, "--task", "vqa"]
    printed = run("train", "blip2-stage2", *SMALL, "--steps", 1, *tiny, "--out", second).stdout
    assert "a tiny language model (" in printed
    start = "VQA accuracy (held-out, derived questions), greedy, 180"
    assert "(majority 25.0 %)" in next(x for x in printed.splitlines() if x.startswith(start))
    assert (second / "answers.png").exists() and (second / "language_model/config.json").exists()
    assert set(json.loads((second / "answers.json").read_text())[0]) == {"question_id", "answer"}
    # a run of stage 2 goes on with another task, and with the same language model
    more = run("train", "blip2-stage2", *SMALL, "--steps", 1, "--from", second, "--out", tmp_path / "s3").stdout
    assert "captions (held-out)" in more and not (tmp_path / "s3/language_model").exists()
