"""LLaVA as it speaks: a run read back, its answers about held-out pictures, and what the end of a run does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmcore import checkpoint
from mmcore.data import DataConfig, PairData, open_data
from mmcore.data.chats import ChatConfig, ChatData, open_chats
from mmcore.data.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.derived_chats import DESCRIBE
from mmcore.data.prompts import Task
from mmcore.data.templates import ChatTokens
from mmcore.eval.answers import Answerer, Decoding
from mmcore.eval.chat import accuracy, majority_accuracy, replies
from mmcore.eval.clip import WEIGHTS
from mmcore.eval.pictures import plot_curves
from mmcore.eval.sheets import plot_captions
from mmcore.eval.speaker import NUM_SHOWN, Speaker
from mmcore.models.language import load_language_tokenizer
from mmcore.models.language_folder import language_model_folder
from mmcore.models.llava import Llava
from mmcore.models.llava_runs import llava_of
from mmcore.models.runs import LLAVA_STAGE1, SavedRun, WeightsKey, find_run

PROMPTS: dict[Task, str | None] = {
    "caption": "Provide a one-sentence caption for the provided image.",
    "vqa": "{}\nAnswer the question using a single word or phrase.",
}
"""LLaVA-1.5's, of models that were trained on its data."""


@dataclass(frozen=True)
class TrainedLlava:
    """A run read back from its checkpoint."""

    run: SavedRun
    model: Llava
    tokens: ChatTokens

    def generate_options(self, decoding: Decoding) -> dict[str, Any]:
        """Of `replies`, but for what these are about."""
        device, longest = next(self.model.parameters()).device, self.run.saved["settings"]["max_answer"]
        return {"device": device, "max_new_tokens": longest, **decoding.generate_options()}


def load_run(where: Path, weights: WeightsKey = "auto", llm: Path | None = None) -> TrainedLlava:
    """Reads a run's newest checkpoint (or the one given) and its tokenizer.

    Args:
        where: the run.
        weights: the averaged ones or not.
        llm: where the language model that it started from is now; None = where it was.

    Raises:
        ValueError: no checkpoint, a damaged one, no such weights in it, a run of another recipe, no language model.
    """
    run = find_run(where, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = llava_of(run, llm, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    settings = run.saved["settings"]
    tokenizer = load_language_tokenizer(language_model_folder(run.folder, run.saved["model"], llm))
    tokens = ChatTokens(tokenizer, settings["template"], settings["max_length"])
    return TrainedLlava(run, model.eval().to(device), tokens)


def chats_of(run: SavedRun) -> ChatData:
    """The conversations that a run was trained on, split as they were."""
    settings = run.saved["settings"]
    return open_chats(
        _chat_config(run), seed=settings["run"]["seed"], captions_only=settings["template"] == "plain"
    )


def _chat_config(run: SavedRun) -> ChatConfig:
    data = run.saved["settings"]["data"]
    return ChatConfig(**data | {"stamps_dir": data["stamps_dir"] and Path(data["stamps_dir"])})


def load_speaker(
    where: Path, weights: WeightsKey = "auto", llm: Path | None = None, data: PairData | None = None
) -> Speaker:
    """A run as what describes pictures, or answers questions about them in one turn.

    Args:
        where: the run.
        weights: the averaged ones or not.
        llm: where its language model is now; None = where it was.
        data: what it is measured on; None = the pictures that a run on 'digits' or 'stamps' held out.

    Raises:
        ValueError: as `load_run`; no data, where the run is of conversations.
    """
    trained = load_run(where, weights, llm)
    chats, seed = _chat_config(trained.run), trained.run.saved["settings"]["run"]["seed"]
    is_derived = chats.data in ("digits", "stamps")
    if data is None:
        if not is_derived:
            raise ValueError(f"--data must be given: {trained.run.folder} was trained on conversations alone")
        options = {"val_fraction": chats.val_fraction, "language": chats.language}
        pairs = DataConfig(chats.data, max_broken=chats.max_broken, stamps_dir=chats.stamps_dir, **options)
        data = open_data(pairs, seed=seed)
    prompts: dict[Task, str | None] = dict(PROMPTS)
    if is_derived:
        prompts = {"caption": DESCRIBE[chats.language], "vqa": "{}"}
    if trained.run.recipe == LLAVA_STAGE1:
        del prompts["vqa"]
    return Speaker(trained.run, data, prompts, lambda decoding: _answerer(trained, decoding))


@dataclass(frozen=True)
class _Given:
    """Images at hand."""

    images: Mapping[str, Image.Image]

    def named_image(self, name: str) -> Image.Image:
        return self.images[name]


def _answerer(trained: TrainedLlava, decoding: Decoding) -> Answerer:
    model, options = trained.model, trained.generate_options(decoding)

    def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        names = [str(i) for i in range(len(images))]
        asked = [
            Conversation(name, (name,), (Turn("user", f"{IMAGE}\n{prompt}"), Turn("assistant", "")))
            for name, prompt in zip(names, prompts, strict=True)
        ]
        chats = ConversationSet("the held-out pictures", _Given(dict(zip(names, images))), asked, False)
        found = replies(model, trained.tokens, model.config, chats, **options)
        return [reply.said for reply in found]

    return say


def print_answers(trained: TrainedLlava, data: ChatData, decoding: Decoding) -> list[Path]:
    """Prints the accuracy of all held-out answers, each after what was said before it; writes them, and draws dialogues
    about some pictures, in which the model reads its own answers, into the run's folder.

    Returns:
        The files.

    Raises:
        ValueError: there are no held-out conversations.
    """
    model = trained.model
    if data.val is None:
        raise ValueError(f"{data.name} has no held-out conversations: give --val-data or --val-fraction")
    options = trained.generate_options(decoding)
    found = replies(model, trained.tokens, model.config, data.val, **options)
    numbers = f"{100 * accuracy(found):.1f} % (majority {100 * majority_accuracy(data.train, found):.1f} %)"
    print(f"answer accuracy (held-out): {numbers}")
    files = [trained.run.folder / "answers.json"]
    answers = [
        {
            "id": data.val.sample_id(r.conversation),
            "question": r.question,
            "answer": r.said,
            "wanted": r.wanted,
        }
        for r in found
    ]
    checkpoint.write_json(files[0], answers)
    pictured = [reply for reply in found if data.val.conversations[reply.conversation].images]
    shown = [pictured[i * len(pictured) // NUM_SHOWN] for i in range(min(NUM_SHOWN, len(pictured)))]
    if not shown:
        return files
    files.append(trained.run.folder / "answers.png")
    plot_captions(
        [data.val.raw_images(reply.conversation)[0] for reply in shown],
        [reply.said for reply in shown],
        [[reply.wanted] for reply in shown],
        files[1],
        title=f"{data.name}: answers about held-out pictures; {numbers}",
        questions=[reply.question for reply in shown],
        right=[reply.is_right for reply in shown],
    )
    return files


def report(trained: TrainedLlava, data: ChatData, records: list[dict[str, Any]]) -> None:
    """What a finished run prints and draws: measured on its checkpoint."""
    run = trained.run
    plot_curves(records, run.folder / "curves.png")
    written = [run.folder / "metrics.jsonl", run.folder / "curves.png"]
    if data.val is not None:
        written += print_answers(trained, data, Decoding())
    print(f"measured on {WEIGHTS[run.key]} of step {run.step}; written:")
    for file in [*written, run.checkpoint]:
        print(f"  {file}")
