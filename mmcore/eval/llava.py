"""What the end of a run of LLaVA does: the accuracy of its answers about held-out pictures, and a sheet of some."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.data.chats import ChatConfig, ChatData, open_chats
from mmcore.data.templates import ChatTokens
from mmcore.eval.chat import accuracy, majority_accuracy, replies
from mmcore.eval.chat_model import model_of_run
from mmcore.eval.clip import WEIGHTS
from mmcore.eval.pictures import plot_captions, plot_curves
from mmcore.models.llava import Llava
from mmcore.models.runs import SavedRun, WeightsKey, find_run

# pictures of a sheet
NUM_SHOWN = 24


@dataclass(frozen=True)
class TrainedLlava:
    """A run read back from its checkpoint."""

    run: SavedRun
    model: Llava
    tokens: ChatTokens
    data: ChatData


def load_run(where: Path, weights: WeightsKey = "auto", llm: Path | None = None) -> TrainedLlava:
    """Reads a run's newest checkpoint (or the one given), its tokenizer and its data.

    Args:
        where: the run.
        weights: the averaged ones or not.
        llm: where the language model that it started from is now; None = where it was.

    Raises:
        ValueError: no checkpoint, a damaged one, no such weights in it, a run of another recipe, no language model.
    """
    run = find_run(where, weights)
    chat = model_of_run(run, llm)
    settings = run.saved["settings"]
    folder = settings["data"]["stamps_dir"]
    config = ChatConfig(**settings["data"] | {"stamps_dir": folder and Path(folder)})
    data = open_chats(config, seed=settings["run"]["seed"], captions_only=settings["template"] == "plain")
    return TrainedLlava(run, chat.model, chat.tokens, data)


def print_answers(trained: TrainedLlava) -> list[Path]:
    """Prints the accuracy of all held-out answers, and draws some into the run's folder.

    Returns:
        The files.

    Raises:
        ValueError: there are no held-out conversations.
    """
    data, model = trained.data, trained.model
    if data.val is None:
        raise ValueError(f"{data.name} has no held-out conversations: give --val-data or --val-fraction")
    device = next(model.parameters()).device
    found = replies(model, trained.tokens, model.config, data.val, device=device)
    numbers = f"{100 * accuracy(found):.1f} % (majority {100 * majority_accuracy(data.train, found):.1f} %)"
    print(f"answer accuracy (held-out): {numbers}")
    pictured = [reply for reply in found if data.val.conversations[reply.conversation].images]
    shown = [pictured[i * len(pictured) // NUM_SHOWN] for i in range(min(NUM_SHOWN, len(pictured)))]
    if not shown:
        return []
    file = trained.run.folder / "answers.png"
    plot_captions(
        [data.val.raw_images(reply.conversation)[0] for reply in shown],
        [reply.said for reply in shown],
        [[reply.wanted] for reply in shown],
        file,
        title=f"{data.name}: answers about held-out pictures; {numbers}",
        questions=[reply.question for reply in shown],
        right=[reply.is_right for reply in shown],
    )
    return [file]


def report(trained: TrainedLlava, records: list[dict[str, Any]]) -> None:
    """What a finished run prints and draws: measured on its checkpoint."""
    run = trained.run
    plot_curves(records, run.folder / "curves.png")
    written = [run.folder / "metrics.jsonl", run.folder / "curves.png"]
    if trained.data.val is not None:
        written += print_answers(trained)
    print(f"measured on {WEIGHTS[run.key]} of step {run.step}; written:")
    for file in [*written, run.checkpoint]:
        print(f"  {file}")
