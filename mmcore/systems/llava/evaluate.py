"""LLaVA as it speaks: a run read back, its answers about held-out pictures, and what the end of a run does."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from mmcore import checkpoint
from mmcore.data import DataConfig, PairData, open_data
from mmcore.data.chats import ChatConfig, ChatData, open_chats
from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.sources.derived_chats import DESCRIBE
from mmcore.data.text.prompts import Task
from mmcore.data.text.templates import ChatTokens
from mmcore.report.pictures import plot_curves
from mmcore.report.sheets import Exchange, plot_dialogues
from mmcore.runs import LLAVA_STAGE1, WEIGHTS, SavedRun, WeightsKey, find_run
from mmcore.systems.llava.chat import model_of_run
from mmcore.systems.llava.dialogue import Dialogue, Sampling
from mmcore.systems.llava.model import Llava
from mmcore.tasks.answers import Answerer, Decoding
from mmcore.tasks.chat import Reply, accuracy, answers_recur, majority_accuracy, replies
from mmcore.tasks.speaker import NUM_SHOWN, Speaker

PROMPTS: dict[Task, str | None] = {
    "caption": "Provide a one-sentence caption for the provided image.",
    "vqa": "{}\nAnswer the question using a single word or phrase.",
}
"""LLaVA-1.5's, of models that were trained on its data."""
# conversations that the end of a run is measured on, while other ranks wait
MAX_REPORTED = 1024
# of a dialogue on a sheet
MAX_EXCHANGES = 4


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
    chat = model_of_run(run, llm)
    return TrainedLlava(run, chat.model, chat.tokens)


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


def print_answers(
    trained: TrainedLlava, data: ChatData, decoding: Decoding, *, most: int | None = None
) -> list[Path]:
    """Prints the accuracy of held-out answers, each after what was said before it, where such a share says something
    (`answers_recur`); writes them, and draws dialogues about some pictures, in which the model reads its own answers,
    into the run's folder.

    Args:
        trained: the model.
        data: whose held-out conversations it answers.
        decoding: how it chooses text.
        most: conversations, evenly spread; None = all.

    Returns:
        The files.

    Raises:
        ValueError: there are no held-out conversations.
    """
    model = trained.model
    if data.val is None:
        raise ValueError(f"{data.name} has no held-out conversations: give --val-data or --val-fraction")
    options = trained.generate_options(decoding)
    found = replies(model, trained.tokens, model.config, data.val, most=most, **options)
    if not found:
        raise ValueError(f"{data.name} has no held-out conversation that can be answered")
    if answers_recur(data.train, data.val):
        share, of_majority = accuracy(found), majority_accuracy(data.train, found)
        numbers = f"{100 * share:.1f} % (majority {100 * of_majority:.1f} %)"
        is_part = most is not None and most < len(data.val)
        part = f", {most} of {len(data.val)} conversations" if is_part else ""
        print(f"answer accuracy (held-out): {numbers}{part}")
    else:
        numbers = "no answer is one of training's"
        print(f"answers (held-out): {numbers}, so that they are to be read, not counted")
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
    of_one: dict[int, list[Reply]] = defaultdict(list)
    for reply in found:
        if data.val.conversations[reply.conversation].images:
            of_one[reply.conversation].append(reply)
    pictured = list(of_one)
    shown = [pictured[i * len(pictured) // NUM_SHOWN] for i in range(min(NUM_SHOWN, len(pictured)))]
    talks = {i: _dialogue(trained, data.val, i, of_one[i]) for i in shown}
    talks = {i: talk for i, talk in talks.items() if talk}  # none, where not even the first question has room
    if talks:
        files.append(trained.run.folder / "dialogues.png")
        images = [data.val.raw_images(i)[0] for i in talks]
        title = f"{data.name}: dialogues about held-out pictures; {numbers}"
        plot_dialogues(images, list(talks.values()), files[1], title=title)
    return files


def _dialogue(
    trained: TrainedLlava, chats: ConversationSet, number: int, found: Sequence[Reply]
) -> list[Exchange]:
    """The questions of a conversation with the model's answers, each after its own before; where it reads no questions,
    what it said."""
    turns, images = chats.conversations[number].turns, chats.raw_images(number)
    template = trained.tokens.template
    questions = [t.text.replace(IMAGE, "").strip() for t in turns if t.role == "user"]
    if (template is not None and template.images_only) or not all(questions):
        return [Exchange(r.question, r.said, r.wanted, r.is_right) for r in found][:MAX_EXCHANGES]
    options = Sampling(max_new_tokens=trained.run.saved["settings"]["max_answer"])
    system = turns[0].text if turns[0].role == "system" else None
    talk, exchanges = Dialogue(trained.model, trained.tokens, system=system, sampling=options), []
    for asked, answered in list(pairwise(turns))[system is not None :: 2][:MAX_EXCHANGES]:
        num_shown = asked.text.count(IMAGE)
        shown, images = images[:num_shown], images[num_shown:]
        question = asked.text.replace(IMAGE, "").strip()
        if not talk.has_room(question, shown):
            break
        reply = Reply(number, question, "".join(talk.ask(question, shown)), answered.text)
        exchanges.append(Exchange(question, reply.said, reply.wanted, reply.is_right))
    return exchanges


def report(trained: TrainedLlava, data: ChatData, records: list[dict[str, Any]]) -> None:
    """What a finished run prints and draws: measured on its checkpoint."""
    run = trained.run
    plot_curves(records, run.folder / "curves.png")
    written = [run.folder / "metrics.jsonl", run.folder / "curves.png"]
    if data.val is not None:
        written += print_answers(trained, data, Decoding(), most=MAX_REPORTED)
    print(f"measured on {WEIGHTS[run.key]} of step {run.step}; written:")
    for file in [*written, run.checkpoint]:
        print(f"  {file}")
