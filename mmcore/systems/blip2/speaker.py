"""BLIP-2 as it speaks: a run of either stage read back, and what the end of one of stage 2 does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmcore.data import PairData
from mmcore.data.text.prompts import PromptTokens, Task
from mmcore.data.text.wordpiece import load_wordpiece
from mmcore.parts.language import load_language_tokenizer
from mmcore.parts.language_folder import language_model_folder
from mmcore.report.pictures import plot_curves
from mmcore.runs import BLIP2_STAGE1, WEIGHTS, WeightsKey, blip2_of, find_run
from mmcore.systems.blip2.start import blip2_lm_of
from mmcore.systems.clip.evaluate import data_of
from mmcore.tasks.answers import Answerer, Decoding, centred, language_answerer
from mmcore.tasks.speaker import Speaker, print_captions, print_vqa


def load_speaker(
    where: Path, weights: WeightsKey = "auto", llm: Path | None = None, data: PairData | None = None
) -> Speaker:
    """Reads the newest checkpoint (or the one given) of a run of BLIP-2's stage 1 or 2.

    Args:
        where: the run.
        weights: the averaged ones or not.
        llm: where its language model is now; None = where it was.
        data: what it is measured on; None = what the run held out.

    Raises:
        ValueError: no checkpoint, a damaged one, no such weights in it, a run of another recipe, no language model.
    """
    run = find_run(where, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, data = run.saved["settings"], data or data_of(run)
    if run.recipe == BLIP2_STAGE1:
        if llm is not None:
            raise ValueError(f"--llm has no effect on a run of {BLIP2_STAGE1}, which has none, got {llm}")
        blip2, wordpiece = blip2_of(run).eval().to(device), load_wordpiece(run.folder / "tokenizer")

        def captions(decoding: Decoding) -> Answerer:
            options = {"max_length": settings["max_text"] - 1, "eos_token_id": wordpiece.sep_token_id}

            def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
                seen = centred(images, blip2.config.vision.image_size).to(device)
                ids = blip2.generate(seen, **options, **decoding.options())
                return [wordpiece.decode(row) for row in ids.tolist()]

            return say

        return Speaker(run, data, {"caption": None}, captions)
    model = blip2_lm_of(run, llm, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = model.eval().to(device)
    folder = language_model_folder(run.folder, run.saved["model"], llm)
    tokens = PromptTokens(
        load_language_tokenizer(folder),
        is_encoder_decoder=model.language_model.config.is_encoder_decoder,
        max_answer=settings["max_text"],
    )

    def answers(decoding: Decoding) -> Answerer:
        return language_answerer(model, tokens, model.visual.config.image_size, device, decoding)

    prompts: dict[Task, str | None] = {"caption": None, "vqa": None}
    return Speaker(run, data, prompts | {settings["task"]: settings["prompt"]}, answers)


def report(speaker: Speaker, records: list[dict[str, Any]]) -> None:
    """What a finished run prints and draws: measured on its checkpoint, as `mmcore eval` would."""
    run = speaker.run
    plot_curves(records, run.folder / "curves.png")
    written = [run.folder / "metrics.jsonl", run.folder / "curves.png"]
    task = run.saved["settings"]["task"]
    if task == "caption" and speaker.data.val is not None:
        written += print_captions(speaker, Decoding())
    if task == "vqa" and speaker.data.val_questions is not None:
        written += print_vqa(speaker, Decoding())
    print(f"measured on {WEIGHTS[run.key]} of step {run.step}; written:")
    for file in [*written, run.checkpoint]:
        print(f"  {file}")
