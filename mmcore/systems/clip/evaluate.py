"""What `mmcore eval` and the end of a training run do with a CLIP: numbers on held-out pairs, and pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.data import DataConfig, PairData, open_data
from mmcore.data.text.tokenizer import Tokenizer, load_tokenizer
from mmcore.metrics.retrieval import Relevance, encoded_once, recall_lines, relevance_of, retrieval_recall
from mmcore.metrics.zeroshot import top_k_accuracy, zero_shot_weights
from mmcore.report.pictures import plot_curves, plot_retrieval
from mmcore.runs import WEIGHTS, SavedRun, WeightsKey, clip_of, find_run
from mmcore.systems.clip.model import CLIP

BATCH_SIZE = 256
NUM_QUERIES = 8

Forward = Callable[[Tensor | None, Tensor | None], Any]
"""A CLIP, bare or under an engine."""


@dataclass(frozen=True)
class TrainedClip:
    """A run read back from its checkpoint."""

    folder: Path
    step: int
    weights: str
    model: CLIP
    tokenizer: Tokenizer
    data: PairData


def data_of(run: SavedRun) -> PairData:
    """The data that a run was trained on, split as it was."""
    settings = run.saved["settings"]
    data = settings["data"] | {
        "stamps_dir": settings["data"]["stamps_dir"] and Path(settings["data"]["stamps_dir"])
    }
    return open_data(DataConfig(**data), seed=settings["run"]["seed"])


def load_run(where: Path, weights: WeightsKey = "auto") -> TrainedClip:
    """Reads a run's newest checkpoint (or the one given), its tokenizer and its data.

    Raises:
        ValueError: no checkpoint, a damaged one, no such weights in it.
    """
    run = find_run(where, weights)
    model = clip_of(run)
    data = data_of(run)
    return TrainedClip(
        run.folder, run.step, run.key, model.eval(), load_tokenizer(run.folder / "tokenizer"), data
    )


@dataclass(frozen=True)
class HeldOut:
    """Embeddings of a run's held-out pairs.

    Attributes:
        image: [I, E] unit-norm, of the readable images.
        index: [I] their positions in the held-out set.
        captions: [N] all captions of these images.
        text: [N, E] unit-norm.
        relevance: which caption is right for which image.
        class_weights: [num_classes, E], or None where there are no classes.
    """

    image: Tensor
    index: Tensor
    captions: list[str]
    text: Tensor
    relevance: Relevance
    class_weights: Tensor | None


@torch.no_grad()
def embed(
    forward: Forward, tokenizer: Tokenizer, data: PairData, *, image_size: int, device: torch.device
) -> HeldOut:
    """Runs both towers over the held-out pairs; under an engine, every rank alike.

    Raises:
        ValueError: there are no held-out pairs, or too many of their images are broken.
        FloatingPointError: the model gives embeddings that are not finite.
    """
    if data.val is None:
        raise ValueError(f"{data.name} has no held-out pairs: give --val-data or --val-fraction")

    def encode_text(tokens: Tensor) -> Tensor:
        return forward(None, tokens.to(device))[1].float().cpu()

    batches = list(data.val.batches(BATCH_SIZE, image_size))
    image = torch.cat([forward(images.to(device), None)[0].float().cpu() for images, _ in batches])
    if not image.isfinite().all():
        raise FloatingPointError("the embeddings of the held-out images are not finite")
    index = torch.cat([i for _, i in batches])
    owners = [(row, caption) for row, i in enumerate(index.tolist()) for caption in data.val.captions[i]]
    captions = [caption for _, caption in owners]
    weights = None
    if data.class_names is not None and data.templates is not None and data.val.labels is not None:
        weights = zero_shot_weights(
            encode_text, tokenizer, data.class_names, data.templates, batch_size=BATCH_SIZE
        )
    return HeldOut(
        image,
        index,
        captions,
        encoded_once(captions, lambda chunk: encode_text(tokenizer(chunk)), BATCH_SIZE),
        relevance_of(captions, [row for row, _ in owners], num_images=len(image)),
        weights,
    )


def zero_shot(held_out: HeldOut, data: PairData) -> dict[int, float]:
    """Top-1 and top-5 accuracy by class names, in [0, 1]; empty where there are no classes."""
    if held_out.class_weights is None or data.val is None or data.val.labels is None:
        return {}
    labels = torch.tensor(data.val.labels)[held_out.index]
    ks = tuple(k for k in (1, 5) if k < len(held_out.class_weights))
    return top_k_accuracy(held_out.image, held_out.class_weights, labels, ks=ks)


def recall(held_out: HeldOut) -> dict[str, float]:
    """R@1, R@5 and R@10 in both directions, with what chance would give, in [0, 1]."""
    return retrieval_recall(held_out.image, held_out.text, held_out.relevance)


def evaluate_clip(
    forward: Forward, tokenizer: Tokenizer, data: PairData, *, image_size: int, device: torch.device
) -> dict[str, float]:
    """The numbers that a training run follows, in [0, 1]: zero-shot accuracy where there are classes, and R@1."""
    held_out = embed(forward, tokenizer, data, image_size=image_size, device=device)
    recalls = recall(held_out)
    return {
        **{f"zero-shot top-{k}": value for k, value in zero_shot(held_out, data).items()},
        **{k.replace("_", " "): recalls[k] for k in ("image_to_text_R@1", "text_to_image_R@1")},
    }


def _embed_run(run: TrainedClip) -> HeldOut:
    size = run.model.config.vision.image_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return embed(run.model.to(device), run.tokenizer, run.data, image_size=size, device=device)


def print_zero_shot(run: TrainedClip, held_out: HeldOut | None = None) -> None:
    """Prints zero-shot accuracy on the held-out pairs.

    Raises:
        ValueError: the data has no classes.
    """
    accuracy = zero_shot(held_out or _embed_run(run), run.data)
    if not accuracy:
        raise ValueError(f"{run.data.name} has no classes to tell apart; mmcore eval retrieval measures it")
    for k, value in accuracy.items():
        name = "zero-shot accuracy" if k == 1 else f"zero-shot top-{k} accuracy"
        print(f"{name} (held-out): {100 * value:.1f} %")


def print_retrieval(run: TrainedClip, held_out: HeldOut | None = None) -> None:
    """Prints R@1, R@5, R@10 in both directions beside what chance would give."""
    held_out = held_out or _embed_run(run)
    recalls = recall(held_out)
    sizes = f"{len(held_out.image)} images, {len(held_out.captions)} captions"
    print(f"retrieval (held-out), {sizes}, in % with chance in brackets:")
    print(*recall_lines(recalls), sep="\n")


def _draw_retrieval(run: TrainedClip, held_out: HeldOut, path: Path) -> None:
    """A sheet of captions, evenly drawn from the distinct ones, with the images nearest to each."""
    distinct = list(dict.fromkeys(held_out.captions))
    queries = distinct[:: max(1, len(distinct) // NUM_QUERIES)][:NUM_QUERIES]
    rows = [held_out.captions.index(query) for query in queries]
    relevant = torch.cat([held_out.relevance.images_of_texts(row, row + 1) for row in rows])
    assert run.data.val is not None
    images = [run.data.val.raw_image(i) for i in held_out.index.tolist()]
    plot_retrieval(queries, held_out.text[rows] @ held_out.image.T, relevant, images, path)


def report(run: TrainedClip, records: list[dict[str, Any]]) -> None:
    """What a finished training run prints and draws: measured on its checkpoint, as `mmcore eval` would."""
    plot_curves(records, run.folder / "curves.png")
    written = ["metrics.jsonl", "curves.png"]
    if run.data.val is not None:
        held_out = _embed_run(run)
        if held_out.class_weights is not None:
            print_zero_shot(run, held_out)
        print_retrieval(run, held_out)
        _draw_retrieval(run, held_out, run.folder / "retrieval.png")
        written.append("retrieval.png")
    print(f"measured on {WEIGHTS[run.weights]} of step {run.step}; written:")
    for name in [*written, f"checkpoints/step-{run.step:08d}"]:
        print(f"  {run.folder / name}")
