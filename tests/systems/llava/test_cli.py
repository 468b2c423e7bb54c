"""`mmcore train llava-stage1|llava-stage2`, `eval` and `export` as a user meets them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

from mmcore import checkpoint
from mmcore.cli import main
from mmcore.data import IMAGE_MEAN, IMAGE_STD, normalized
from mmcore.data.sources.conversations import IMAGE, Turn
from mmcore.data.text.templates import ChatSample, expand
from mmcore.parts.adapters import is_adapter
from mmcore.parts.vit import VisionConfig
from mmcore.runs import read_run
from mmcore.systems.llava.anyres import Size
from mmcore.systems.llava.inputs import processor_config, views
from mmcore.systems.llava.model import LlavaConfig
from mmcore.tasks import conversation, subject_of
from mmcore.tasks.conversation import answers_recur
from mmcore.tasks.speaking import Options
from tests.mmcore.data_fixtures import image_bytes, write_vqa
from tests.mmcore.test_data_exams import problems
from tests.systems.cli import losses, run
from tests.systems.llava.fixtures import write_given

SMALL = ["--steps", 4, "--save-every", 2, "--eval-every", 4, "--log-every", 1, "--batch-size", 16, "--lr", "1e-3"]
SMALL += ["--val-fraction", "0.02", "--max-length", 512, "--max-answer", 4]
LAST = "checkpoints/step-00000004"
LORA = ["--lora", 4, "--projector-lr", "1e-4", "--activation-checkpointing"]
Run = tuple[Path, str]


def model_of(folder: Path) -> Any:
    return read_run(folder).model


@pytest.fixture(scope="module")
def first(tower: Path, language: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of stage 1."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    inputs = ["--vision", tower, "--llm", language, "--out", folder]
    return folder, run("train", "llava-stage1", *SMALL, *inputs).stdout


@pytest.fixture(scope="module")
def second(first: Run) -> Run:
    """A finished run of stage 2."""
    folder = first[0].with_name("second")
    return folder, run("train", "llava-stage2", *SMALL, "--from", first[0], "--out", folder).stdout


@pytest.fixture(scope="module")
def adapted(first: Run) -> Path:
    """One that trains adapters alone."""
    folder = first[0].with_name("adapted")
    run("train", "llava-stage2", *SMALL, "--from", first[0], *LORA, "--out", folder)
    return folder


def test_a_run_prints_what_it_measured_and_leaves_what_it_names(second: Run) -> None:
    folder, printed = second
    line = printed.splitlines()[0]
    assert line.startswith("answer accuracy (held-out): ") and "% (majority " in line
    for name in ("metrics.jsonl", "curves.png", "dialogues.png", LAST):
        assert str(folder / name) in printed and (folder / name).exists()
    assert sorted(losses(folder)) == [1, 2, 3, 4]


def test_stage_1_learns_the_projector_and_stage_2_the_language_model_too(first: Run, second: Run, language: Path):
    learned = []
    for folder, _ in (first, second):
        names = [name for name, _ in checkpoint.tensors(folder / LAST, "weight")]
        learned.append({name.split(".")[0] for name in names})
    assert learned == [{"projector"}, {"projector", "language_model"}]
    given = load_file(language / "model.safetensors")
    one, two = (model_of(folder) for folder, _ in (first, second))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.language_model.state_dict()[name], given[name])
    assert not torch.equal(two.language_model.state_dict()[name], given[name])
    for a, b in zip(one.visual.parameters(), two.visual.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adapters_alone_are_trained_and_resumed_and_the_next_run_builds_on_them(adapted, language, tmp_path):
    trained, again = dict(checkpoint.tensors(adapted / LAST, "weight")), tmp_path / "run"
    assert {n.split(".")[0] for n in trained if not is_adapter(n)} == {"projector"}
    assert sum(map(is_adapter, trained)) == 2 * 4 * 7  # A and B, layers, linear layers in each
    shutil.copytree(adapted, again)
    shutil.rmtree(again / LAST)
    run("train", "llava-stage2", *SMALL, *LORA, "--out", again, "--resume", "latest")
    for name, x in checkpoint.tensors(again / LAST, "weight"):
        assert torch.equal(x, trained[name]), name
    next_run = [*SMALL, "--from", again, "--lora", 2, "--out", tmp_path / "next"]
    run("train", "llava-stage2", *next_run, "--steps", 1, "--val-fraction", 0, "--lr", "1e-9", "--projector-lr", "1e-9")
    name = "model.layers.0.mlp.up_proj"
    b, a = (trained[f"language_model.{name}.lora_{m}.default.weight"] for m in "BA")
    merged = load_file(language / "model.safetensors")[f"{name}.weight"] + 2 * b @ a
    kept = load_file(tmp_path / "next/frozen.safetensors")
    torch.testing.assert_close(kept[f"language_model.{name}.weight"], merged)
    start = model_of(tmp_path / "next/checkpoints/step-00000001")
    torch.testing.assert_close(start.language_model.state_dict()[f"{name}.weight"], merged)


def test_stage_2_starts_from_transformers_folders_and_the_originals_projector(tower: Path, language: Path, tmp_path):
    given = write_given(tmp_path, tower, language)
    few = [*SMALL, "--steps", 2, "--save-every", 1, "--val-fraction", 0]
    run("train", "llava-stage2", *few, "--from", given[0], "--out", tmp_path / "hf")
    inputs = ["--from", given[1], "--vision", tower, "--llm", language, "--out", tmp_path / "bin"]
    run("train", "llava-stage2", *few, *inputs)
    last = [tmp_path / name / "checkpoints/step-00000002" for name in ("hf", "bin")]
    one, two = (dict(checkpoint.tensors(x, "weight")) for x in last)
    assert one.keys() == two.keys()
    for name in one:  # both are the same model
        torch.testing.assert_close(one[name], two[name], msg=name)


def test_held_out_answers_are_those_that_the_run_printed(second: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder, printed = second
    main(["eval", "vqa", str(folder)])
    line, *files = capsys.readouterr().out.splitlines()
    assert line == printed.splitlines()[0] and "(majority " in line
    assert [file.strip() for file in files] == [str(folder / name) for name in ("answers.json", "dialogues.png")]
    answers = json.loads((folder / "answers.json").read_text())
    right = sum(a["answer"] == a["wanted"] for a in answers)
    assert f": {100 * right / len(answers):.1f} %" in line


def test_answers_of_which_training_has_none_are_not_counted(first: Run, capsys: pytest.CaptureFixture[str]) -> None:
    subject = subject_of(read_run(first[0]))
    train, val = subject.data.train, subject.data.val
    assert val is not None and answers_recur(train, val)
    turn = Turn("assistant", "a word that no training answer is")
    val = replace(val, conversations=[replace(c, turns=(*c.turns[:-1], turn)) for c in val.conversations])
    assert not answers_recur(train, val)
    conversation.report(replace(subject, data=replace(subject.data, val=val.take([0, 1]))), Options())
    printed = capsys.readouterr().out
    assert printed == ("answers (held-out): no answer is one of training's, so that they are to be read, not counted\n")


def test_pictures_that_the_run_held_out_are_described(first: Run, second: Run, capsys) -> None:
    for folder, _ in (first, second):
        main(["eval", "caption", str(folder)])
        assert "captions (held-out), greedy, 39 images: BLEU-4 " in capsys.readouterr().out
        assert len(json.loads((folder / "captions.json").read_text())) == 39


def test_questions_and_captions_of_a_file_are_answered_in_other_words_and_ways(second: Run, tmp_path: Path, capsys):
    folder = str(second[0])
    questions, annotations = map(str, write_vqa(tmp_path, 4))
    given = ["--data", questions, "--annotations", annotations]
    main(["eval", "vqa", folder, *given, "--decode", "nucleus", "--prompt", "tell me: {}"])
    assert "VQA accuracy (held-out), nucleus, 8 questions: " in capsys.readouterr().out
    main(["eval", "vqa", folder, "--data", problems(tmp_path), "--prompt", "{}\nAnswer with the option's letter."])
    assert "VQA accuracy (held-out), greedy, 3 questions: " in capsys.readouterr().out
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(0, kind="PNG"))
    records = [{"image": f"{i}.png", "caption": ["a dog", "it"], "image_id": f"0{7 + i}"} for i in range(2)]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    main(["eval", "caption", folder, "--data", str(tmp_path / "captions.json")])
    assert "captions (held-out), greedy, 2 images" in capsys.readouterr().out
    assert [x["image_id"] for x in json.loads((second[0] / "captions.json").read_text())] == [7, 8]


@pytest.mark.parametrize(("which", "arguments", "message"), [
    (0, ["vqa", "--data", "VQA"], "RUN must be of a model that answers questions, got one of llava-stage1"),
    (1, ["vqa", "--data", "digits"], "--data must be a file or shards, of which all is held out"),
    (1, ["vqa", "--prompt", "{}"], "--prompt has no effect on conversations without --data"),
    (1, ["caption", "--image-root", "x"], "--image-root has no effect without --data, got 'x'"),
    (1, ["caption", "--data", "VQA"], "has no held-out captions to compare with"),
    (1, ["retrieval"], "retrieval asks for a model that embeds or matches, which a run of llava-stage2 does not"),
])  # fmt: skip
def test_a_mistake_about_a_run_gets_one_sentence(first, second, which, arguments, message, tmp_path, capsys):
    questions, annotations = map(str, write_vqa(tmp_path, 2))
    given = [questions if x == "VQA" else x for x in arguments]
    given += ["--annotations", annotations] * ("VQA" in arguments)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", given[0], str((first, second)[which][0]), *given[1:]])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_what_is_exported_answers_in_transformers_as_the_run_does(adapted: Path, tmp_path: Path, capsys):
    main(["export", str(adapted), "--out", str(tmp_path / "out")])
    assert f"the weights of step 4 written to {tmp_path / 'out'} (hf)" in capsys.readouterr().out
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    ours: Any = read_run(adapted)
    image, asked = Image.effect_noise((40, 26), 60).convert("RGB"), Turn("user", f"{IMAGE}\nwhat is it?")
    prompt = ours.assets.tokens.prompt([asked])
    text = ours.assets.tokens.tokenizer.decode(prompt[prompt > 0]).replace("USER: ", f"USER: {IMAGE}", 1)
    inputs = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": 8, "do_sample": False}
    read = expand(ChatSample(prompt, prompt), [ours.model.config.num_image_tokens((26, 40))]).tokens
    seen = views(image, ours.model.config)
    expected = ours.model.generate(read[None], torch.tensor([len(read)]), seen, **options)
    assert torch.equal(theirs.generate(**inputs, **options)[:, len(read) :], expected)


@pytest.mark.parametrize("pinpoints", [(), ((16, 32), (32, 16), (32, 32))], ids=["square", "tiles"])
def test_transformers_processor_sees_what_ours_sees(pinpoints: tuple[Size, ...], tmp_path: Path) -> None:
    config = LlavaConfig(VisionConfig(image_size=16, patch_size=4, width=20, num_heads=2), grid_pinpoints=pinpoints)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config(config)))
    from_folder: Any = AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((40, 26), (16, 16), (7, 33)):
        image = Image.effect_noise(size, 60).convert("RGB")
        found = from_folder(image, return_tensors="pt")["pixel_values"].reshape(-1, 3, 16, 16)
        wanted = normalized(views(image, config), IMAGE_MEAN, IMAGE_STD)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
