"""`mmcore train llava-stage1|llava-stage2` as a user meets them, in processes of their own."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from safetensors.torch import load_file

from mmcore import checkpoint
from mmcore.data.chats import open_chats
from mmcore.parts.language import (
    load_language_model,
    load_language_tokenizer,
    tiny_language_model,
    tiny_tokenizer,
)
from mmcore.parts.towers import load_tower
from mmcore.runs import find_run
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.shapes import CLIP_CONFIGS
from mmcore.systems.clip.weights import save_clip
from mmcore.systems.llava.config import LlavaStage2Config
from mmcore.systems.llava.model import Llava, LlavaConfig, is_adapter
from mmcore.systems.llava.recipe import _begin
from mmcore.systems.llava.runs import llava_of, load_trained
from mmcore.systems.llava.weights import save_llava
from tests.distributed.launch import free_port
from tests.mmcore.data_fixtures import image_bytes
from tests.systems.clip.test_cli import losses, run

SMALL = [
    "--steps",
    4,
    "--save-every",
    2,
    "--eval-every",
    4,
    "--log-every",
    1,
    "--batch-size",
    16,
    "--lr",
    "1e-3",
]
SMALL += ["--val-fraction", "0.02", "--max-length", 512, "--max-answer", 4]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CLIP and a language model, of random weights."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    save_clip(CLIP(CLIP_CONFIGS["tiny"]), folder / "clip")
    tokenizer = tiny_tokenizer(["USER: which digit is written here? ASSISTANT: seven"] * 4)
    tiny_language_model(tokenizer).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder / "clip", folder / "llama"


@pytest.fixture(scope="module")
def first(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of stage 1."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    inputs = ["--vision", parts[0], "--llm", parts[1], "--out", folder]
    return folder, run("train", "llava-stage1", *SMALL, *inputs).stdout


@pytest.fixture(scope="module")
def second(first: tuple[Path, str]) -> tuple[Path, str]:
    """A finished run of stage 2."""
    folder = first[0].with_name("second")
    return folder, run("train", "llava-stage2", *SMALL, "--from", first[0], "--out", folder).stdout


def test_a_run_prints_what_it_measured_and_leaves_what_it_names(second: tuple[Path, str]) -> None:
    folder, printed = second
    line = printed.splitlines()[0]
    assert line.startswith("answer accuracy (held-out): ") and "% (majority " in line
    for name in ("metrics.jsonl", "curves.png", "dialogues.png", "checkpoints/step-00000004"):
        assert str(folder / name) in printed and (folder / name).exists()
    assert sorted(losses(folder)) == [1, 2, 3, 4]


def test_stage_1_learns_the_projector_and_stage_2_the_language_model_too(
    first: tuple[Path, str], second: tuple[Path, str], parts: tuple[Path, Path]
) -> None:
    learned = []
    for folder, _ in (first, second):
        names = [name for name, _ in checkpoint.tensors(folder / "checkpoints/step-00000004", "weight")]
        learned.append({name.split(".")[0] for name in names})
    assert learned == [{"projector"}, {"projector", "language_model"}]
    given = load_file(parts[1] / "model.safetensors")
    one, two = (llava_of(find_run(folder)) for folder, _ in (first, second))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.language_model.state_dict()[name], given[name])
    assert not torch.equal(two.language_model.state_dict()[name], given[name])
    for a, b in zip(one.visual.parameters(), two.visual.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(second: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = second
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    run("train", "llava-stage2", *SMALL, "--out", again, "--resume", "latest")
    assert losses(again) == losses(folder)
    expected = dict(checkpoint.tensors(folder / "checkpoints/step-00000004", "weight"))
    for name, x in checkpoint.tensors(again / "checkpoints/step-00000004", "weight"):
        assert torch.equal(x, expected[name]), name


def test_adapters_alone_are_trained_and_resumed_and_the_next_run_builds_on_them(
    first: tuple[Path, str], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    lora = ["--lora", 4, "--projector-lr", "1e-4", "--activation-checkpointing"]
    run("train", "llava-stage2", *SMALL, "--from", first[0], *lora, "--out", tmp_path / "run")
    last = tmp_path / "run/checkpoints/step-00000004"
    trained = dict(checkpoint.tensors(last, "weight"))
    assert {n.split(".")[0] for n in trained if not is_adapter(n)} == {"projector"}
    assert sum(map(is_adapter, trained)) == 2 * 4 * 7  # A and B, layers, linear layers in each
    shutil.rmtree(last)
    run("train", "llava-stage2", *SMALL, *lora, "--out", tmp_path / "run", "--resume", "latest")
    for name, x in checkpoint.tensors(last, "weight"):
        assert torch.equal(x, trained[name]), name
    next_run = [*SMALL, "--from", tmp_path / "run", "--lora", 2, "--out", tmp_path / "next"]
    run("train", "llava-stage2", *next_run, "--steps", 1, "--val-fraction", 0)
    name = "model.layers.0.mlp.up_proj"
    b, a = (trained[f"language_model.{name}.lora_{m}.default.weight"] for m in "BA")
    merged = load_file(parts[1] / "model.safetensors")[f"{name}.weight"] + 2 * b @ a
    kept = load_file(tmp_path / "next/frozen.safetensors")
    torch.testing.assert_close(kept[f"language_model.{name}.weight"], merged)
    start = find_run(tmp_path / "next/checkpoints/step-00000000")
    torch.testing.assert_close(llava_of(start).language_model.state_dict()[f"{name}.weight"], merged)


@pytest.fixture(scope="module")
def given(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of transformers with a LLaVA, and the original's file of its projector."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(1)
    tower = load_tower(parts[0])
    model = Llava(LlavaConfig(tower.config), load_language_model(parts[1], dtype=None))
    model.visual.load_state_dict(tower.state)
    save_llava(model, folder / "llava", tokenizer=load_language_tokenizer(parts[1]))
    learned = {f"model.mm_projector.{n}": x for n, x in model.projector.state_dict().items()}
    torch.save(learned, folder / "mm_projector.bin")
    return folder / "llava", folder / "mm_projector.bin"


def test_stage_2_starts_from_transformers_folders_and_the_originals_projector(
    given: tuple[Path, Path], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    few = [*SMALL, "--steps", 2, "--save-every", 1, "--val-fraction", 0]
    run("train", "llava-stage2", *few, "--from", given[0], "--out", tmp_path / "hf")
    inputs = ["--from", given[1], "--vision", parts[0], "--llm", parts[1], "--out", tmp_path / "bin"]
    run("train", "llava-stage2", *few, *inputs)
    last = [tmp_path / name / "checkpoints/step-00000002" for name in ("hf", "bin")]
    one, two = (dict(checkpoint.tensors(x, "weight")) for x in last)
    assert one.keys() == two.keys()
    for name in one:  # both are the same model
        torch.testing.assert_close(one[name], two[name], msg=name)
    shutil.rmtree(last[0])
    run("train", "llava-stage2", *few, "--out", tmp_path / "hf", "--resume", "latest")
    assert losses(tmp_path / "hf") == losses(tmp_path / "bin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--from", "BIN", "--vision", "CLIP"],
            "--vision and --llm must be given where --from is a projector",
        ),
        (["--from", "HF", "--vision", "CLIP"], "--vision and --anyres have no effect where --from is"),
        (["--from", "HF", "--llm", "LLM"], "--llm has no effect where --from is"),
        (["--from", "CLIP"], "config.json must have model_type 'llava' or 'llava_next', got 'clip'"),
        (["--from", "WRONG", "--vision", "CLIP", "--llm", "LLM"], "weights must have its names and shapes"),
    ],
)
def test_a_start_that_does_not_fit_gets_one_sentence(
    arguments: list[str], message: str, given: tuple[Path, Path], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    places = {"CLIP": parts[0], "LLM": parts[1], "HF": given[0], "BIN": given[1], "WRONG": tmp_path / "x.bin"}
    torch.save({"model.mm_projector.weight": torch.zeros(3, 4)}, tmp_path / "x.bin")
    config = tyro.cli(LlavaStage2Config, args=[str(places.get(x, x)) for x in arguments])
    with pytest.raises(ValueError, match=re.escape(message)):
        begin = _begin(config, open_chats(config.data, seed=0))
        load_trained(Llava(begin.config, begin.language.model), None, begin.state)


# as LLaVA's users have them
ZERO: dict[str, Any] = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9}
ZERO |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
ZERO |= {"stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9}
ZERO |= {"stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True}
ZERO_FILE: dict[str, Any] = {"zero_optimization": ZERO, "bf16": {"enabled": "auto"}}
ZERO_FILE |= {"fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}}
ZERO_FILE |= {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
ZERO_FILE |= {"gradient_accumulation_steps": "auto"}


@pytest.mark.parametrize(("stage", "zero"), [("llava-stage1", 2), ("llava-stage2", 3)])
def test_two_ranks_train_and_resume_on_llavas_json_with_texts_alone_too(
    stage: str, zero: int, first: tuple[Path, str], parts: tuple[Path, Path], tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
    records = []
    for i in range(24):
        record = {"id": i, "conversations": turns}
        if stage == "llava-stage2" and i % 2:
            texts = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]
            record["conversations"] = texts
        else:
            (tmp_path / f"{i}.png").write_bytes(image_bytes(i, kind="PNG"))
            record["image"] = f"{i}.png"
        records.append(record)
    (tmp_path / "x.json").write_text(json.dumps(records))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "-m", "mmcore.train"]
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO_FILE))
    inputs = ["--data", tmp_path / "x.json", "--val-fraction", "0.2", "--batch-size", 4]
    inputs += ["--zero", zero] if zero == 2 else ["--deepspeed", tmp_path / "zero3.json"]
    inputs += ["--from", first[0]] if stage == "llava-stage2" else ["--vision", parts[0], "--llm", parts[1]]
    out = tmp_path / "run"
    done = run(stage, *SMALL, *inputs, "--out", out, launcher=torchrun)
    assert f"4 steps of 8 pairs, ZeRO {zero}, fp32, 2 ranks" in done.stderr
    expected = losses(out)
    assert "answer accuracy (held-out): " in done.stdout and sorted(expected) == [1, 2, 3, 4]
    shutil.rmtree(out / "checkpoints/step-00000004")
    run(stage, *SMALL, *inputs, "--out", out, "--resume", "latest", launcher=torchrun)
    assert losses(out) == expected


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("llava-stage1", ["--llm", "tiny"], "--vision must be given"),
        (
            "llava-stage1",
            ["--vision", "CLIP"],
            "--llm must be a language model's folder or 'tiny', got nothing",
        ),
        (
            "llava-stage1",
            ["--vision", "CLIP", "--llm", "LLM", "--template", "v2"],
            "template must be one of plain, v1",
        ),
        (
            "llava-stage1",
            ["--vision", "CLIP", "--llm", "LLM", "--data", "x.json"],
            "data must be an existing file",
        ),
        ("llava-stage2", [], "--from must be given: a run of llava-stage1"),
        ("llava-stage2", ["--from", "missing"], "RUN must be a run's folder"),
        ("llava-stage2", ["--max-answer", "0"], "--max-answer must be at least 1, got 0"),
        ("llava-stage2", ["--lora", "0"], "rank must be at least 1"),
        ("llava-stage2", ["--lora-alpha", "8"], "--lora-alpha has no effect without --lora"),
        ("llava-stage2", ["--vision-lr", "1e-6"], "--vision-lr has no effect without --train-vision"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(
    stage: str, arguments: list[str], message: str, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    places = {"CLIP": parts[0], "LLM": parts[1]}
    given = [places.get(x, x) for x in arguments]
    done = run("train", stage, "--out", tmp_path / "run", *given, code=2)
    printed = " ".join(done.stderr.replace("│", " ").split())  # tyro draws a box around what a config refuses
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()
