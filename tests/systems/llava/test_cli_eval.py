"""`mmcore eval` and `mmcore export` of runs of LLaVA."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

from mmcore.cli import main
from mmcore.data.sources.conversations import IMAGE, Turn
from mmcore.data.text.templates import ChatSample, expand
from mmcore.parts.vit import VisionConfig
from mmcore.systems.llava.anyres import Size
from mmcore.systems.llava.evaluate import chats_of, load_run, print_answers
from mmcore.systems.llava.loader import processor_config, views
from mmcore.systems.llava.model import LlavaConfig
from mmcore.tasks.answers import Decoding
from mmcore.tasks.chat import answers_recur
from tests.mmcore.data_fixtures import image_bytes
from tests.mmcore.test_data_questions import write_vqa
from tests.systems.clip.test_cli import run
from tests.systems.llava.test_cli import SMALL, parts  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def runs(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    """A run of stage 1, one of stage 2 with adapters, and what the latter printed."""
    folder = tmp_path_factory.mktemp("runs")
    inputs = ["--vision", parts[0], "--llm", parts[1], "--out", folder / "first"]
    few = [*SMALL, "--steps", 2, "--eval-every", 2]
    run("train", "llava-stage1", *few, *inputs)
    inputs = ["--from", folder / "first", "--out", folder / "second", "--lora", 2]
    return folder / "first", folder / "second", run("train", "llava-stage2", *few, *inputs).stdout


def test_held_out_answers_are_those_that_the_run_printed(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second, printed = runs
    main(["eval", "vqa", str(second)])
    line, *files = capsys.readouterr().out.splitlines()
    assert line == printed.splitlines()[0] and "(majority " in line
    assert [file.strip() for file in files] == [
        str(second / name) for name in ("answers.json", "dialogues.png")
    ]
    answers = json.loads((second / "answers.json").read_text())
    right = sum(a["answer"] == a["wanted"] for a in answers)
    assert f": {100 * right / len(answers):.1f} %" in line


def test_answers_of_which_training_has_none_are_not_counted(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_run(runs[0])
    data = chats_of(trained.run)
    val = data.val
    assert val is not None and answers_recur(data.train, val)
    turn = Turn("assistant", "a word that no training answer is")
    unique = [replace(c, turns=(*c.turns[:-1], turn)) for c in val.conversations]
    val = replace(val, conversations=unique)
    assert not answers_recur(data.train, val)
    print_answers(trained, replace(data, val=val), Decoding(), most=2)
    printed = capsys.readouterr().out
    assert printed == (
        "answers (held-out): no answer is one of training's, so that they are to be read, not counted\n"
    )


def test_pictures_that_the_run_held_out_are_described(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in runs[:2]:
        main(["eval", "caption", str(folder)])
        assert "captions (held-out), greedy, 39 images: BLEU-4 " in capsys.readouterr().out
        assert len(json.loads((folder / "captions.json").read_text())) == 39


def test_questions_and_captions_of_a_file_are_answered_in_other_words_and_ways(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = str(runs[1])
    questions, annotations = map(str, write_vqa(tmp_path, 4))
    given = ["--data", questions, "--annotations", annotations]
    main(["eval", "vqa", second, *given, "--decode", "nucleus", "--prompt", "tell me: {}"])
    assert "VQA accuracy (held-out), nucleus, 8 questions: " in capsys.readouterr().out
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(0, kind="PNG"))
    records = [{"image": f"{i}.png", "caption": ["a dog", "it"], "image_id": f"0{7 + i}"} for i in range(2)]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    main(["eval", "caption", second, "--data", str(tmp_path / "captions.json")])
    assert "captions (held-out), greedy, 2 images" in capsys.readouterr().out
    assert [x["image_id"] for x in json.loads((runs[1] / "captions.json").read_text())] == [7, 8]


@pytest.mark.parametrize(
    ("which", "arguments", "message"),
    [
        (
            0,
            ["vqa", "--data", "VQA"],
            "RUN must be of a model that answers questions, got one of llava-stage1",
        ),
        (1, ["vqa", "--data", "digits"], "--data must be a file or shards, of which all is held out"),
        (1, ["vqa", "--prompt", "{}"], "--prompt has no effect on conversations without --data"),
        (1, ["caption", "--image-root", "x"], "--annotations and --image-root have no effect without --data"),
        (1, ["caption", "--data", "VQA"], "has no held-out captions to compare with"),
        (1, ["retrieval"], "RUN must be of mmcore train clip"),
    ],
)
def test_a_mistake_gets_one_sentence(
    runs: Any,
    which: int,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions, annotations = map(str, write_vqa(tmp_path, 2))
    given = [questions if x == "VQA" else x for x in arguments]
    given += ["--annotations", annotations] * ("VQA" in arguments)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", given[0], str(runs[which]), *given[1:]])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_what_is_exported_answers_in_transformers_as_the_run_does(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(runs[1]), "--out", str(tmp_path / "out")])
    assert f"the weights of step 2 written to {tmp_path / 'out'} (hf)" in capsys.readouterr().out
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    trained = load_run(runs[1])
    image = Image.effect_noise((40, 26), 60).convert("RGB")
    prompt = trained.tokens.prompt([Turn("user", f"{IMAGE}\nwhat is it?")])
    text = trained.tokens.tokenizer.decode(prompt[prompt > 0]).replace("USER: ", f"USER: {IMAGE}", 1)
    inputs = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
    seen = views(image, trained.model.config)
    torch.testing.assert_close(inputs["pixel_values"], seen, rtol=0, atol=1e-6)
    count = trained.model.config.num_image_tokens((26, 40))
    read = expand(ChatSample(prompt, prompt), [count]).tokens
    assert torch.equal(inputs["input_ids"][0], read.masked_fill(read < 0, theirs.config.image_token_index))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = trained.model.generate(read[None], torch.tensor([len(read)]), seen, **options)
    assert torch.equal(theirs.generate(**inputs, **options)[:, len(read) :], expected)


@pytest.mark.parametrize("pinpoints", [(), ((16, 32), (32, 16), (32, 32))], ids=["square", "tiles"])
def test_transformers_processor_sees_what_ours_sees(pinpoints: tuple[Size, ...], tmp_path: Path) -> None:
    config = LlavaConfig(
        VisionConfig(image_size=16, patch_size=4, width=20, num_heads=2), grid_pinpoints=pinpoints
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config(config)))
    from_folder: Any = AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((40, 26), (16, 16), (7, 33)):
        image = Image.effect_noise(size, 60).convert("RGB")
        found = from_folder(image, return_tensors="pt")["pixel_values"].reshape(-1, 3, 16, 16)
        torch.testing.assert_close(found, views(image, config), rtol=0, atol=1e-6)
