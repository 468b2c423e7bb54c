"""Matching and re-ranked retrieval, on a model whose answers are known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.data.text.wordpiece import Texts
from mmcore.metrics.retrieval import recall_of_scores, relevance_of, retrieval_recall
from mmcore.systems.blip2.retrieval import HeldOut, matching_accuracy, matching_scores, reranked

CPU = torch.device("cpu")
NUM = 150


def held_out(similarity: Tensor | None = None, num: int = NUM) -> HeldOut:
    """Image i is the number i, and so is its caption."""
    numbers = torch.arange(num)
    captions = [str(i) for i in range(num)]
    return HeldOut(
        index=numbers,
        tower=numbers.view(-1, 1, 1).float(),
        captions=captions,
        texts=Texts(numbers[:, None], torch.ones(num, dtype=torch.int64)),
        owner=numbers,
        relevance=relevance_of(captions, numbers, num_images=num),
        similarity=torch.zeros(num, num) if similarity is None else similarity,
        right=torch.eye(num, dtype=torch.bool),
    )


class Numbers:
    """Says yes with certainty 2 - |image - text|, and is wrong about the first `num_wrong` images."""

    def __init__(self, num_wrong: int = 0) -> None:
        self.num_wrong = num_wrong

    def __call__(
        self, task: str, kept: Any, tower: Tensor, place: Tensor, tokens: Tensor, _: Tensor
    ) -> Tensor:
        assert task == "match" and kept is None
        image = tower[place, 0, 0]
        yes = (0.5 - (image - tokens[:, 0]).abs()) * torch.where(image < self.num_wrong, -1, 1)
        return torch.stack([torch.zeros_like(yes), yes], 1)


def test_scores_are_those_of_the_pairs_that_were_asked_for() -> None:
    image, text = torch.tensor([5, 3, 140, 3]), torch.tensor([5, 4, 138, 3])
    found = matching_scores(Numbers(), held_out(), image, text, CPU)
    assert found.tolist() == [0.5, -0.5, -1.5, 0.5]


@pytest.mark.parametrize("num_wrong", [0, 30, NUM])
def test_accuracy_counts_right_and_wrong_pairs_alike(num_wrong: int) -> None:
    found = matching_accuracy(Numbers(num_wrong), held_out(), CPU)
    # the wrong image of a caption is drawn from all others
    assert found == pytest.approx(1 - num_wrong / NUM, abs=0.04)


def test_a_pair_of_the_same_class_is_no_wrong_pair() -> None:
    same = held_out()
    classes = torch.arange(NUM) % 2
    all_right = classes[:, None] == classes
    seen = []

    class Watching(Numbers):
        def __call__(self, task: str, kept: Any, tower: Tensor, place: Tensor, *texts: Tensor) -> Tensor:
            seen.append((tower[place, 0, 0] - texts[0][:, 0]) % 2)
            return super().__call__(task, kept, tower, place, *texts)

    matching_accuracy(Watching(), HeldOut(**{**vars(same), "right": all_right}), CPU)
    differences = torch.cat(seen)
    assert (differences[:NUM] == 0).all() and (differences[NUM:] == 1).all()


def test_the_nearest_are_ranked_by_matching_and_the_others_stay_behind_them() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.rand(NUM, NUM, generator=generator)
    # the right one is among the nearest 10, seldom the nearest
    similarity = noise + 0.09 * torch.eye(NUM)
    i2t, t2i = reranked(Numbers(), held_out(similarity), CPU, top_k=10)
    for scores, of in ((i2t, similarity), (t2i, similarity.T)):
        near = of.topk(10, 1).indices
        is_near = torch.zeros(NUM, NUM, dtype=torch.bool).scatter(1, near, True)
        assert (
            scores.masked_fill(~is_near, torch.inf).amin(1) > scores.masked_fill(is_near, -torch.inf).amax(1)
        ).all()
        far = scores.masked_fill(is_near, -torch.inf).argsort(1, descending=True)[:, : NUM - 10]
        expected = of.masked_fill(is_near, -torch.inf).argsort(1, descending=True)[:, : NUM - 10]
        assert torch.equal(far, expected)
        is_there = is_near.diagonal()
        assert torch.equal(scores.argmax(1)[is_there], torch.arange(NUM)[is_there])


def test_recall_of_scores_is_that_of_the_features_they_come_from() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    relevance = relevance_of(
        [f"caption {i % 25}" for i in range(30)], [i % 20 for i in range(30)], num_images=20
    )
    expected = retrieval_recall(image, text, relevance)
    assert recall_of_scores(image @ text.T, text @ image.T, relevance) == expected
    with pytest.raises(ValueError, match=r"recall_of_scores: image_to_text must be \[20, 30\] without NaN"):
        recall_of_scores(text @ image.T, text @ image.T, relevance)
