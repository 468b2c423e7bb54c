"""What `mmcore eval caption|vqa` and the end of a run of BLIP-2's second stage do: numbers, files, a sheet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmcore import checkpoint
from mmcore.data import PairData
from mmcore.data.prompts import PromptTokens, Task
from mmcore.data.wordpiece import load_wordpiece
from mmcore.eval.answers import Answerer, Decoding, answer, caption, language_answerer, majority_accuracy
from mmcore.eval.clip import WEIGHTS, data_of
from mmcore.eval.pictures import plot_curves
from mmcore.eval.sheets import plot_captions
from mmcore.eval.vqa import vqa_accuracy
from mmcore.models.language import load_language_tokenizer
from mmcore.models.language_folder import language_model_folder
from mmcore.models.runs import BLIP2_STAGE1, SavedRun, WeightsKey, blip2_of, find_run
from mmcore.models.stage2 import blip2_lm_of

# pictures of a sheet
NUM_SHOWN = 24


@dataclass(frozen=True)
class Speaker:
    """A run read back from its checkpoint, that says something of pictures.

    Args:
        run: which one.
        data: its data, split as it was.
        image_size: pixels.
        task: what it was trained for.
        prompt: of that task.
        says: by a way to choose text, what it says.
    """

    run: SavedRun
    data: PairData
    image_size: int
    task: Task
    prompt: str | None
    says: Callable[[Decoding], Answerer]


def load_speaker(where: Path, weights: WeightsKey = "auto", llm: Path | None = None) -> Speaker:
    """Reads the newest checkpoint (or the one given) of a run of BLIP-2's stage 1 or 2.

    Args:
        where: the run.
        weights: the averaged ones or not.
        llm: where its language model is now; None = where it was.

    Raises:
        ValueError: no checkpoint, a damaged one, no such weights in it, a run of another recipe, no language model.
    """
    run = find_run(where, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, data = run.saved["settings"], data_of(run)
    if run.recipe == BLIP2_STAGE1:
        if llm is not None:
            raise ValueError(f"--llm has no effect on a run of {BLIP2_STAGE1}, which has none, got {llm}")
        blip2, wordpiece = blip2_of(run).eval().to(device), load_wordpiece(run.folder / "tokenizer")

        def captions(decoding: Decoding) -> Answerer:
            options = {"max_length": settings["max_text"] - 1, "eos_token_id": wordpiece.sep_token_id}

            def say(images: Tensor, prompts: Sequence[str]) -> list[str]:
                ids = blip2.generate(images.to(device), **options, **decoding.options())
                return [wordpiece.decode(row) for row in ids.tolist()]

            return say

        return Speaker(run, data, blip2.config.vision.image_size, "caption", None, captions)
    model = blip2_lm_of(run, llm, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = model.eval().to(device)
    folder = language_model_folder(run.folder, run.saved["model"], llm)
    tokens = PromptTokens(
        load_language_tokenizer(folder),
        is_encoder_decoder=model.language_model.config.is_encoder_decoder,
        max_answer=settings["max_text"],
    )

    def answers(decoding: Decoding) -> Answerer:
        return language_answerer(model, tokens, device, decoding.options())

    size = model.visual.config.image_size
    return Speaker(run, data, size, settings["task"], settings["prompt"], answers)


def print_captions(speaker: Speaker, decoding: Decoding) -> list[Path]:
    """Prints BLEU-4 and CIDEr of the captions of held-out pictures; writes them as COCO's evaluation reads them, and a
    sheet of some, into the run's folder.

    Returns:
        The files.

    Raises:
        ValueError: there are no held-out pictures.
    """
    val = speaker.data.val
    if val is None:
        raise ValueError(f"{speaker.data.name} has no held-out pairs: give --val-data or --val-fraction")
    torch.manual_seed(0)
    prompt = speaker.prompt if speaker.task == "caption" else None
    found = caption(speaker.says(decoding), val, prompt=prompt, image_size=speaker.image_size)
    numbers = f"BLEU-4 {100 * found.scores['BLEU-4']:.1f}, CIDEr {100 * found.scores['CIDEr']:.1f}"
    print(f"captions (held-out), {decoding.decode}, {len(found.index)} images: {numbers}")
    results = [{"image_id": i, "caption": text} for i, text in zip(found.index, found.texts, strict=True)]
    shown = _spread(len(found.index))
    return _written(
        speaker,
        "captions",
        results,
        [val.raw_image(found.index[i]) for i in shown],
        [found.texts[i] for i in shown],
        [val.captions[found.index[i]] for i in shown],
        title=f"{speaker.data.name}: captions of held-out pictures, {decoding.decode}; {numbers}",
    )


def print_vqa(speaker: Speaker, decoding: Decoding) -> list[Path]:
    """Prints VQA's accuracy on the held-out questions; writes the answers as VQA's evaluation reads them, and a sheet
    of some, into the run's folder.

    Returns:
        The files.

    Raises:
        ValueError: there are no held-out questions, or a run of stage 1, which answers none.
    """
    val, train = speaker.data.val_questions, speaker.data.questions
    if speaker.run.recipe == BLIP2_STAGE1:
        raise ValueError(f"RUN must have a language model to answer questions, got one of {BLIP2_STAGE1}")
    if val is None or train is None:
        raise ValueError(f"{speaker.data.name} has no held-out questions")
    torch.manual_seed(0)
    prompt = speaker.prompt if speaker.task == "vqa" else None
    found = answer(speaker.says(decoding), val, prompt=prompt, image_size=speaker.image_size)
    kind = ", derived questions" if val.derived else ""
    numbers = (
        f"{100 * found.accuracy:.1f} % (majority {100 * majority_accuracy(train, found.questions):.1f} %)"
    )
    print(f"VQA accuracy (held-out{kind}), {decoding.decode}, {len(found.texts)} questions: {numbers}")
    for name, value in found.by_type.items():
        print(f"  {name} {100 * value:.1f} %")
    results = [
        {"question_id": q.question_id, "answer": text}
        for q, text in zip(found.questions, found.texts, strict=True)
    ]
    place = {q.question_id: i for i, q in enumerate(val.questions)}
    shown = _spread(len(found.texts))
    asked = [found.questions[i] for i in shown]
    return _written(
        speaker,
        "answers",
        results,
        [val.raw_image(place[q.question_id]) for q in asked],
        [found.texts[i] for i in shown],
        [q.answers for q in asked],
        title=f"{speaker.data.name}: answers about held-out pictures, {decoding.decode}; {numbers}",
        questions=[q.text for q in asked],
        right=[
            vqa_accuracy([found.texts[i]], [q.answers]).overall > 0 for i, q in zip(shown, asked, strict=True)
        ],
    )


def _spread(count: int) -> list[int]:
    """Evenly spread over what there is."""
    return [i * count // NUM_SHOWN for i in range(NUM_SHOWN)] if count > NUM_SHOWN else list(range(count))


def _written(
    speaker: Speaker,
    name: str,
    results: list[dict[str, Any]],
    images: list[Image.Image],
    texts: list[str],
    people: Sequence[Sequence[str]],
    *,
    title: str,
    questions: list[str] | None = None,
    right: list[bool] | None = None,
) -> list[Path]:
    files = [speaker.run.folder / f"{name}.{kind}" for kind in ("json", "png")]
    checkpoint.write_json(files[0], results)
    plot_captions(images, texts, people, files[1], title=title, questions=questions, right=right)
    return files


def report(speaker: Speaker, records: list[dict[str, Any]]) -> None:
    """What a finished run prints and draws: measured on its checkpoint, as `mmcore eval` would."""
    run = speaker.run
    plot_curves(records, run.folder / "curves.png")
    written = [run.folder / "metrics.jsonl", run.folder / "curves.png"]
    if speaker.task == "caption" and speaker.data.val is not None:
        written += print_captions(speaker, Decoding())
    if speaker.task == "vqa" and speaker.data.val_questions is not None:
        written += print_vqa(speaker, Decoding())
    print(f"measured on {WEIGHTS[run.key]} of step {run.step}; written:")
    for file in [*written, run.checkpoint]:
        print(f"  {file}")
