"""Image-text retrieval on held-out pairs, re-ranked where the model matches pairs, or by matching alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.metrics.retrieval import recall_lines, recall_of_scores, retrieval_recall
from mmcore.report.pictures import plot_retrieval
from mmcore.tasks.matching import every_score, scores
from mmcore.tasks.subject import Options, Subject

__all__ = ["Options", "follow", "report"]

TOP_K = 128
"""Candidates of each query that matching ranks anew, as published for BLIP-2."""
MAX_MATCHED = 8192
"""Pairs each way that a report has matched, so that a small machine is done in a minute or two."""
NUM_QUERIES = 8


def follow(subject: Subject) -> dict[str, float]:
    """R@1 both ways while a run trains."""
    if subject.pairs.val is None:
        return {}
    recalls = _recall(subject, compared(subject))
    return {k.replace("_", " "): recalls[k] for k in ("image_to_text_R@1", "text_to_image_R@1")}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints R@1, R@5, R@10 both ways beside what chance would give; draws the images nearest to some captions."""
    if options is None and subject.pairs.val is None:
        return []
    subject.val  # noqa: B018 (raises where there is none)
    held_out, ranked = subject.held_out, ""
    both, what = compared(subject), subject.pairs.val_name
    recalls = _recall(subject, both)
    if held_out.image is None:
        ranked = "all pairs matched, "
    elif held_out.states is not None:
        top_k = min(TOP_K, max(1, MAX_MATCHED // len(held_out.captions)))
        recalls = recall_of_scores(*reranked(subject, top_k), held_out.relevance)
        ranked = f"the {top_k} nearest ranked by matching, "
    sizes = f"{len(held_out.index)} images, {len(held_out.captions)} captions"
    print(f"retrieval ({what}), {ranked}{sizes}, in % with chance in brackets:")
    print(*recall_lines(recalls), sep="\n")
    if what != PairData.val_name:
        for way in ("text to image", "image to text"):
            found, chance = (100 * recalls[f"{way} {key}".replace(" ", "_")] for key in ("R@1", "chance R@1"))
            print(f"{way} R@1 ({what}): {found:.1f} % (chance {chance:.1f} %)")
    if options is not None:
        return []
    path = subject.folder / "retrieval.png"
    _draw(subject, both or held_out.scores, path)
    return [path]


def compared(subject: Subject) -> tuple[Tensor, Tensor] | None:
    """Scores of images and captions both ways, [I, N] and [N, I]; None where those of unit vectors, which need not all
    be held, say as much."""
    held_out = subject.held_out
    if held_out.image is None:
        return every_score(subject)
    return None if held_out.image.ndim == 2 else held_out.scores


def _recall(subject: Subject, both: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    held_out = subject.held_out
    if both is not None:
        return recall_of_scores(*both, held_out.relevance)
    return retrieval_recall(held_out.image, held_out.text, held_out.relevance)


def reranked(subject: Subject, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores both ways, [I, N] and [N, I]: of the `top_k` nearest candidates similarity and matching, summed; the
    others come behind them, in their order."""
    ranked = []
    # behind the others two neighbours in float32 could become one
    both = subject.held_out.similarity.double()
    for similarity, is_text in ((both, True), (both.T, False)):
        near, candidate = similarity.topk(min(top_k, similarity.shape[1]), dim=1)
        query = torch.arange(len(similarity))[:, None].expand_as(candidate)
        pair = (query, candidate) if is_text else (candidate, query)
        matched = scores(subject, *(x.flatten() for x in pair))
        best = near + matched.view_as(near)
        floor = best.min() - similarity.max() - 1
        ranked.append((similarity + floor).scatter(1, candidate, best))
    return ranked[0], ranked[1]


def _draw(subject: Subject, both: tuple[Tensor, Tensor], path: Path) -> None:
    """Captions, evenly drawn from the distinct ones, with the images nearest to each."""
    held_out = subject.held_out
    distinct = list(dict.fromkeys(held_out.captions))
    queries = distinct[:: max(1, len(distinct) // NUM_QUERIES)][:NUM_QUERIES]
    rows = [held_out.captions.index(query) for query in queries]
    relevant = torch.cat([held_out.relevance.images_of_texts(row, row + 1) for row in rows])
    images = [subject.val.raw_image(i) for i in held_out.index.tolist()]
    plot_retrieval(queries, both[1][rows], relevant, images, path)
