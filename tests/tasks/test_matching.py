"""Matching and re-ranked retrieval, on a model whose answers are known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.metrics.retrieval import recall_of_scores, relevance_of, retrieval_recall
from mmcore.tasks.matching import accuracy, figures, scores
from mmcore.tasks.retrieval import reranked
from mmcore.tasks.subject import HeldOut, Subject

CPU = torch.device("cpu")
NUM = 150


class Numbers:
    """A recipe whose model is certain by .5 - |image - text|, and wrong about the first `num_wrong` images."""

    def __init__(self, num_wrong: int = 0) -> None:
        self.num_wrong, self.asked = num_wrong, []

    def matches(self, *_: Any) -> Any:
        def certainty(states: Tensor, index: Tensor, captions: list[str]) -> Tensor:
            image, text = states[index, 0, 0], torch.tensor([float(c) for c in captions])
            self.asked.append((image - text) % 2)
            return (0.5 - (image - text).abs()) * torch.where(image < self.num_wrong, -1, 1)

        return certainty

    def pictures(self, data: Any) -> Any:
        return data


def subject(recipe: Numbers, similarity: Tensor | None = None, labels: list[int] | None = None) -> Subject:
    """Image i is the number i, and so is its caption."""
    numbers, captions = torch.arange(NUM), [str(i) for i in range(NUM)]
    relevance, zeros = relevance_of(captions, numbers, num_images=NUM), torch.zeros(NUM, 1)
    held_out = HeldOut(numbers, captions, numbers, relevance, zeros, zeros, numbers.view(-1, 1, 1).float())
    if similarity is not None:
        vars(held_out)["scores"] = similarity, similarity.T
    val = SimpleNamespace(labels=labels, labels_match=labels is not None)
    found = Subject(recipe, None, None, SimpleNamespace(val=val), CPU)
    vars(found)["held_out"] = held_out
    return found


def test_scores_are_those_of_the_pairs_that_were_asked_for() -> None:
    image, text = torch.tensor([5, 3, 140, 3]), torch.tensor([5, 4, 138, 3])
    found = scores(subject(Numbers()), image, text)
    assert found.tolist() == [0.5, -0.5, -1.5, 0.5]


@pytest.mark.parametrize("num_wrong", [0, 30, NUM])
def test_accuracy_counts_right_and_wrong_pairs_alike(num_wrong: int) -> None:
    found = figures(subject(Numbers(num_wrong)))
    # the wrong image of a caption is drawn from all others
    assert found["ITM accuracy"] == pytest.approx(1 - num_wrong / NUM, abs=0.04)
    assert (found["ITM order"] == 1) == (num_wrong == 0) and found["ITM order"] >= found["ITM accuracy"] - 0.04


def test_a_pair_of_the_same_class_is_no_wrong_pair() -> None:
    recipe = Numbers()
    accuracy(subject(recipe, labels=[i % 2 for i in range(NUM)]))
    differences = torch.cat(recipe.asked)
    assert (differences[:NUM] == 0).all() and (differences[NUM:] == 1).all()


def test_the_nearest_are_ranked_by_matching_and_the_others_stay_behind_them() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.rand(NUM, NUM, generator=generator)
    # the right one is among the nearest 10, seldom the nearest
    similarity = noise + 0.09 * torch.eye(NUM)
    i2t, t2i = reranked(subject(Numbers(), similarity), top_k=10)
    for ranked, of in ((i2t, similarity), (t2i, similarity.T)):
        near = of.topk(10, 1).indices
        is_near = torch.zeros(NUM, NUM, dtype=torch.bool).scatter(1, near, True)
        assert (ranked.masked_fill(~is_near, torch.inf).amin(1) > ranked.masked_fill(is_near, -torch.inf).amax(1)).all()
        far = ranked.masked_fill(is_near, -torch.inf).argsort(1, descending=True)[:, : NUM - 10]
        expected = of.masked_fill(is_near, -torch.inf).argsort(1, descending=True)[:, : NUM - 10]
        assert torch.equal(far, expected)
        is_there = is_near.diagonal()
        assert torch.equal(ranked.argmax(1)[is_there], torch.arange(NUM)[is_there])


def test_recall_of_scores_is_that_of_the_features_they_come_from() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    relevance = relevance_of([f"caption {i % 25}" for i in range(30)], [i % 20 for i in range(30)], num_images=20)
    expected = retrieval_recall(image, text, relevance)
    assert recall_of_scores(image @ text.T, text @ image.T, relevance) == expected
    with pytest.raises(ValueError, match=r"recall_of_scores: image_to_text must be \[20, 30\] without NaN"):
        recall_of_scores(text @ image.T, text @ image.T, relevance)
