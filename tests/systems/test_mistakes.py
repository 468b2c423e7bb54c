"""Mistakes in all recipes and verbs: one sentence each, and nothing is left behind.

That such an error ends the process with 2 is in clip/test_cli.py; here no process is started.
"""

import re
from pathlib import Path

import pytest
import torch

from mmcore.cli import main
from mmcore.systems.llava.weights import save_llava
from tests.systems.blip2.fixtures import write_start
from tests.systems.cli import begin
from tests.systems.llava.fixtures import llava, tokenizer, write_given, write_run


@pytest.fixture(scope="module")
def places(tower: Path, language: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What words of the table stand for."""
    folder = tmp_path_factory.mktemp("places")
    given = write_given(folder, tower, language)
    save_llava(llava(), folder / "folder", tokenizer=tokenizer())
    torch.save({"model.mm_projector.weight": torch.zeros(3, 4)}, folder / "x.bin")
    (folder / "empty").mkdir()
    (folder / "empty/config.json").write_text('{"recipe": "llava-stage2"}')
    return {
        "TOWER": tower, "LLM": language, "START": write_start(folder / "start"), "HF": given[0], "BIN": given[1],
        "WRONG": folder / "x.bin", "FOLDER": folder / "folder", "EMPTY": folder / "empty",
        "PLAIN": write_run(folder / "plain", recipe="llava-stage1", template="plain"),
        "RUN": write_run(folder / "run"), "OF_CLIP": write_run(folder / "clip", recipe="clip"),
    }  # fmt: skip


# of each verb and recipe, its arguments and what the sentence holds, `.*` in place of anything
MISTAKES: dict[str, list[tuple[str, str]]] = {
    "paint": [("", "must be one of train, eval, chat, export, plan, prove, capfilt, got 'paint'")],
    "train clip": [
        ("--data digitz", "did you mean 'digits'"),
        ("--data stamps --language zh", "got 'zh'; did you mean 'zh_CN'?"),
        ("--batch-size 5000", "batch"),
        ("--model ViT-B32", "ViT-B-32"),
        ("--deepspeed missing.json", "missing.json"),
        ("--init missing", "missing"),
        ("--no-such-option 1", "no-such-option"),
        ("--vision missing", "missing"),
        ("--vision TOWER --init TOWER", "--vision must be left out with --init"),
        ("--vision LLM", "must hold a model that reads pixel_values, got one of input_ids"),
        ("--text TOWER", "folder must hold a tokenizer"),
        ("--lock-image", "--lock-image must come with --vision or --init, got neither"),
        ("--no-image-head", "--no-image-head must come with --vision, got none"),
        ("--vision TOWER --lock-image --lock-image-unlocked-groups 7", "must be below the 7 of this tower, got 7"),
        ("--vision TOWER --lock-image-unlocked-groups 1", "--lock-image-unlocked-groups must be at least 0 and beside"),
        ("--max-text 9", "--max-text must be at least 2 and beside --text, got 9"),
    ],
    "train lit": [
        ("", "--vision must be given, the image tower that texts are learned for"),
        ("--vision TOWER --feature-cache x --lock-image-unlocked-groups 3", "must come with a locked image tower"),
    ],
    "train align": [
        ("--model tinny", "--model must be one of tiny, base, got 'tinny'"),
        ("--init TOWER", "config.json must have model_type 'align', got 'clip'"),
        ("--init TOWER --model tiny", "--model must be left out with --init, got tiny"),
    ],
    "train unicl": [("--label-classes 10", "--label-classes must be from 1 to 9, got 10")],
    "train blip2-stage1": [
        ("", "--vision must be given, or --no-freeze-vision"),
        ("--no-freeze-vision --accum 2", "--accum must be 1 with blip2-stage1, got 2"),
        ("--no-freeze-vision --max-text 65", "--max-text must be from 2 to 64, got 65"),
        ("--no-freeze-vision --model tinny", "did you mean 'tiny'?"),
        ("--vision missing", "path must be a weights file or a folder"),
    ],
    "train blip2-stage2": [
        ("--llm tiny", "--from must be given: a run of blip2-stage1"),
        ("--from START", "--llm must be a language model's folder or 'tiny'"),
        ("--from missing --llm tiny", "load_blip2: folder must hold config.json, got missing"),
        ("--from START --llm tiny --accum 2", "--accum must be 1 with blip2-stage2, got 2"),
        ("--from START --llm LLM --llm-steps 2", "--llm-steps must be at least 1 and beside --llm tiny"),
        ("--from START --llm LLM --prompt a{}", "--prompt must hold no {}"),
    ],
    "train llava-stage1": [
        ("--llm tiny", "--vision must be given"),
        ("--vision TOWER", "--llm must be a language model's folder or 'tiny', got nothing"),
        ("--vision TOWER --llm LLM --template v2", "template must be one of plain, v1"),
    ],
    "train llava-stage2": [
        ("", "--from must be given: a run of llava-stage1"),
        ("--from missing", "RUN must be a run's folder"),
        ("--max-answer 0", "--max-answer must be at least 1, got 0"),
        ("--lora 0", "--lora must be at least 1, got 0"),
        ("--lora-alpha 8", "--lora-alpha has no effect without --lora"),
        ("--vision-lr 1e-6", "--vision-lr has no effect without --train-vision"),
        ("--from BIN --vision TOWER", "--vision and --llm must be given where --from is a projector"),
        ("--from HF --vision TOWER", "--vision and --anyres have no effect where --from is"),
        ("--from HF --llm LLM", "--llm has no effect where --from is"),
        ("--from TOWER", "config.json must have model_type 'llava' or 'llava_next', got 'clip'"),
        ("--from WRONG --vision TOWER --llm LLM", "weights must have its names and shapes"),
    ],
    "train mae": [
        ("--mask-ratio 1", "mask_ratio must mask and leave at least one of 16 patches, got 1.0"),
        ("--mask-ratio 0", "mask_ratio must mask and leave at least one of 16 patches, got 0.0"),
        ("--model ViT-B-32", "mae: --model must be one of tiny, ViT-B-16, .* got 'ViT-B-32'"),
    ],
    "eval": [
        ("zeroshot missing", "missing"),
        ("reconstruction OF_CLIP", "reconstruction asks for a model that reconstructs, which a run of clip does not"),
        ("speed missing", "the task must be one of zeroshot, retrieval, .*, got 'speed'"),
    ],
    "chat": [
        ("missing", "RUN must be a run of a model that converses, .* got missing, which is no folder"),
        (".", "which has no config.json"),
        ("FOLDER", "--template must say how .* was trained, by auto, v1, llama_3, chatml, since"),
        ("FOLDER --template plain", "--template must say how .*, got 'plain'"),
        ("FOLDER --template llama_3", "got llama_3: .* needs '<|eot_id|>' as one token"),
        ("FOLDER --template v1 --weights ema", "--weights has no effect on a folder .* got ema"),
        ("FOLDER --template v1 --llm x", "--llm has no effect on a folder .* got x"),
        ("FOLDER --template v1 --top-p 0.5", "--top-p has no effect without"),
        ("PLAIN", "which describes images alone (template plain): train llava-stage2 from it"),
        ("RUN --template v1", "--template has no effect on a run, which knows its own, got v1"),
        ("OF_CLIP", "RUN must be of a model that converses, got .* which is of clip"),
        ("EMPTY", "holds no checkpoint"),
    ],
    "prove": [("clipp", "got 'clipp'; did you mean 'clip'?")],
    "plan": [
        ("siglip --global-batch 64 --gpus 1 --gpu h200 --activation-checkpointing", "must be left out for siglip"),
        ("", "must be followed by one of"),
        ("vitt", "got vitt"),
        ("clip --global-batch 100 --gpus 8", "multiple of --gpus times --accum, 8, got 100"),
        ("clip --global-batch 8 --gpus 8 --model ViT-L14", "did you mean 'ViT-L-14'?"),
        ("clip --global-batch 8 --gpus 8 --zero 0 --precision bf16", "got --zero 0"),
        ("llava --global-batch 8 --gpus 8 --llm nowhere", "a folder with a config.json, got nowhere"),
        ("llava --global-batch 8 --gpus 8 --llm qwen2-0.5b --tokens 9", "--tokens must be at least 578, got 9"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "arguments", "sentence"), [(verb, *row) for verb, rows in MISTAKES.items() for row in rows]
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(verb, arguments, sentence, places, tmp_path, capsys):
    words = [str(places.get(word, word)) for word in arguments.split()]
    with pytest.raises(SystemExit) as stopped:
        if verb.startswith("train "):
            begin(verb.split()[1], "--out", str(tmp_path / "run"), *words)
        else:
            main([*verb.split(), *words])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and not (tmp_path / "run").exists()
    shown = " ".join(err.replace("│", " ").split())  # tyro frames and wraps its own
    assert re.search(".*".join(map(re.escape, sentence.split(".*"))), shown), err
    is_tyros = "For full helptext, " in err
    assert "Traceback" not in err and (is_tyros or (err.startswith("mmcore: ") and len(err.splitlines()) == 1)), err
