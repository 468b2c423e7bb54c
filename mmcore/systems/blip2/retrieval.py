"""What a BLIP-2 of stage 1 is measured by: retrieval, re-ranked by matching, and the matching itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.data import EvalSet, PairData
from mmcore.data.text.wordpiece import Texts, WordPiece, load_wordpiece
from mmcore.metrics.retrieval import Relevance, encoded_once, recall_lines, recall_of_scores, relevance_of
from mmcore.report.pictures import plot_curves
from mmcore.runs import WEIGHTS, WeightsKey, blip2_of, find_run
from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.clip.evaluate import data_of

BATCH_SIZE = 64
# Candidates of each query that matching ranks anew, as published.
TOP_K = 128
# Pairs each way that a report has matched, so that a small machine is done in a minute or two.
MAX_MATCHED = 8192

Forward = Callable[..., Any]
"""A BLIP2, bare or under an engine."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out images and captions as the model sees them, on the CPU.

    Args:
        index: [I] positions in the held-out set.
        tower: [I, P, D] states of the image tower.
        captions: the N captions of these images.
        texts: their tokens, [N, T].
        owner: [N] the image of each, in [0, I).
        relevance: which caption is right for which image.
        similarity: [I, N] of features.
        right: bool [N, I], the images that a caption is right for: those of `relevance`, and of its class where that
            says all of a caption.
    """

    index: Tensor
    tower: Tensor
    captions: list[str]
    texts: Texts
    owner: Tensor
    relevance: Relevance
    similarity: Tensor
    right: Tensor


@torch.no_grad()
def look(
    forward: Forward,
    wordpiece: WordPiece,
    val: EvalSet,
    *,
    image_size: int,
    max_text: int,
    device: torch.device,
) -> HeldOut:
    """Runs the model over the held-out images and their captions; under an engine, every rank alike.

    Raises:
        ValueError: too many broken images.
        FloatingPointError: features that are not finite.
    """
    tower, image, index = [], [], []
    for images, i in val.batches(BATCH_SIZE, image_size):
        states = forward("tower", images.to(device))
        tower.append(states.cpu())
        image.append(forward("encode_image", states).float().cpu())
        index.append(i)
    owners = [(row, c) for row, i in enumerate(torch.cat(index).tolist()) for c in val.captions[i]]
    captions = [caption for _, caption in owners]
    texts = wordpiece(captions, max_text)

    def encode(chunk: list[str]) -> Tensor:
        return forward("encode_text", *(x.to(device) for x in wordpiece(chunk, max_text))).float().cpu()

    text, features = encoded_once(captions, encode, BATCH_SIZE), torch.cat(image)
    similarity = torch.stack([(row @ text.T).amax(0) for row in features])
    if not similarity.isfinite().all():
        raise FloatingPointError("the features of the held-out pairs are not finite")
    owner = torch.tensor([row for row, _ in owners])
    relevance = relevance_of(captions, owner, num_images=len(features))
    right = relevance.images_of_texts(0, len(captions))
    if val.labels_match and val.labels is not None:
        classes = torch.tensor(val.labels)[torch.cat(index)]
        right = right | (classes[owner][:, None] == classes)
    return HeldOut(torch.cat(index), torch.cat(tower), captions, texts, owner, relevance, similarity, right)


@torch.no_grad()
def matching_scores(
    forward: Forward, held_out: HeldOut, image: Tensor, text: Tensor, device: torch.device
) -> Tensor:
    """The logit of "yes" less that of "no" for pairs of images and captions.

    Args:
        forward: the model.
        held_out: what the numbers are of.
        image, text: int64 [R].

    Returns:
        [R] float32, on the CPU.
    """
    scores = []
    for first in range(0, len(image), BATCH_SIZE):
        part = slice(first, first + BATCH_SIZE)
        chosen, place = image[part].unique(return_inverse=True)
        texts = (x[text[part]].to(device) for x in held_out.texts)
        logits = (
            forward("match", None, held_out.tower[chosen].to(device), place.to(device), *texts).float().cpu()
        )
        scores.append(logits[:, 1] - logits[:, 0])
    return torch.cat(scores)


def reranked(
    forward: Forward, held_out: HeldOut, device: torch.device, top_k: int = TOP_K
) -> tuple[Tensor, Tensor]:
    """Scores both ways, [I, N] and [N, I]: of the `top_k` nearest candidates similarity and matching, summed; the
    others come behind them, in their order."""
    ranked = []
    # behind the others two neighbours in float32 could become one
    both = held_out.similarity.double()
    for similarity, is_text in ((both, True), (both.T, False)):
        near, candidate = similarity.topk(min(top_k, similarity.shape[1]), dim=1)
        query = torch.arange(len(similarity))[:, None].expand_as(candidate)
        pair = (query, candidate) if is_text else (candidate, query)
        matched = matching_scores(forward, held_out, *(x.flatten() for x in pair), device=device)
        best = near + matched.view_as(near)
        floor = best.min() - similarity.max() - 1
        ranked.append((similarity + floor).scatter(1, candidate, best))
    return ranked[0], ranked[1]


def matching_accuracy(forward: Forward, held_out: HeldOut, device: torch.device, seed: int = 0) -> float:
    """The share of pairs told right from wrong: each caption with its image, and with one drawn from those that it is
    wrong for. Half is chance."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.arange(len(held_out.captions))
    wrong = ~held_out.right
    has_wrong = wrong.any(1)
    drawn = torch.multinomial(wrong[has_wrong].double(), 1, generator=generator)[:, 0]
    right_scores = matching_scores(forward, held_out, held_out.owner, text, device)
    wrong_scores = matching_scores(forward, held_out, drawn, text[has_wrong], device)
    return torch.cat([right_scores > 0, wrong_scores < 0]).double().mean().item()


def evaluate_blip2(
    forward: Forward,
    wordpiece: WordPiece,
    val: EvalSet,
    *,
    image_size: int,
    max_text: int,
    device: torch.device,
) -> dict[str, float]:
    """The numbers that a run of stage 1 follows, in [0, 1]: the matching's accuracy, and R@1 of the features."""
    held_out = look(forward, wordpiece, val, image_size=image_size, max_text=max_text, device=device)
    recalls = recall_of_scores(held_out.similarity, held_out.similarity.T, held_out.relevance)
    return {
        "ITM accuracy": matching_accuracy(forward, held_out, device),
        **{k.replace("_", " "): recalls[k] for k in ("image_to_text_R@1", "text_to_image_R@1")},
    }


@dataclass(frozen=True)
class TrainedBlip2:
    """A run of stage 1 read back from its checkpoint."""

    folder: Path
    step: int
    weights: str
    model: BLIP2
    wordpiece: WordPiece
    data: PairData
    max_text: int


def load_run(where: Path, weights: WeightsKey = "auto") -> TrainedBlip2:
    """Reads a run's newest checkpoint (or the one given), its tokenizer and its data.

    Raises:
        ValueError: no checkpoint, a damaged one, no such weights in it, a run of another recipe.
    """
    run = find_run(where, weights)
    model, pairs = blip2_of(run), data_of(run)
    wordpiece = load_wordpiece(run.folder / "tokenizer")
    return TrainedBlip2(
        run.folder, run.step, run.key, model.eval(), wordpiece, pairs, run.saved["settings"]["max_text"]
    )


def print_measured(run: TrainedBlip2) -> None:
    """Prints the matching's accuracy and the recall of re-ranked retrieval on the held-out pairs.

    Raises:
        ValueError: there are none.
    """
    if run.data.val is None:
        raise ValueError(f"{run.data.name} has no held-out pairs: give --val-data or --val-fraction")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, size = run.model.to(device), run.model.config.vision.image_size
    held_out = look(model, run.wordpiece, run.data.val, image_size=size, max_text=run.max_text, device=device)
    print(f"ITM accuracy (held-out): {100 * matching_accuracy(model, held_out, device):.1f} %")
    top_k = min(TOP_K, max(1, MAX_MATCHED // len(held_out.captions)))
    recalls = recall_of_scores(*reranked(model, held_out, device, top_k), held_out.relevance)
    sizes = f"{len(held_out.index)} images, {len(held_out.captions)} captions"
    print(
        f"retrieval (held-out), the {top_k} nearest ranked by matching, {sizes}, in % with chance in brackets:"
    )
    print(*recall_lines(recalls), sep="\n")


def report(run: TrainedBlip2, records: list[dict[str, Any]]) -> None:
    """What a finished run prints and draws: measured on its checkpoint, as `mmcore eval` would."""
    plot_curves(records, run.folder / "curves.png")
    if run.data.val is not None:
        print_measured(run)
    print(f"measured on {WEIGHTS[run.weights]} of step {run.step}; written:")
    for name in ("metrics.jsonl", "curves.png", f"checkpoints/step-{run.step:08d}"):
        print(f"  {run.folder / name}")
