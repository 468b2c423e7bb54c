"""Zero-shot accuracy and retrieval recall: hand-computed cases, and brute force on random ones."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmcore.metrics import relevance_of, retrieval_recall, top_k_accuracy, zero_shot_weights
from tests.refusals import refuses


def brute_force(scores: Tensor, right: Tensor, k: int) -> float:
    """R@k of the rows by sorting, for scores without ties."""
    return right.gather(1, scores.argsort(1, descending=True)[:, :k]).any(1).double().mean().item()


def test_equal_captions_share_their_images():
    relevance = relevance_of(["A cat ", "b", "a  CAT"], [0, 0, 1], num_images=2)
    assert relevance.texts_of_images(0, 2).tolist() == [[True, True, True], [True, False, True]]
    assert relevance.images_of_texts(0, 3).tolist() == [[True, True], [True, False], [True, True]]
    assert relevance.images_of_texts(1, 3).tolist() == [[True, False], [True, True]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_recall_equals_brute_force_for_any_relevance_and_chunk(data: st.DataObject):
    num_images = data.draw(st.integers(1, 6))
    images = [*range(num_images), *data.draw(st.lists(st.integers(0, num_images - 1), max_size=8))]
    captions = data.draw(st.lists(st.sampled_from("abcdef"), min_size=len(images), max_size=len(images)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    a, b = (torch.randn(num, 5, generator=generator) for num in (num_images, len(images)))
    relevance = relevance_of(captions, images, num_images=num_images)
    out = retrieval_recall(a, b, relevance, ks=(1, 2, 5), chunk_size=data.draw(st.integers(1, 7)))
    shown = set(zip(images, captions, strict=True))
    right = torch.tensor([[(i, caption) in shown for caption in captions] for i in range(num_images)])
    for k in (1, 2, 5):
        assert out[f"image_to_text_R@{k}"] == pytest.approx(brute_force(a @ b.T, right, k))
        assert out[f"text_to_image_R@{k}"] == pytest.approx(brute_force(b @ a.T, right.T, k))


def test_chance_equals_the_mean_over_every_order():
    relevance = relevance_of(["a", "b", "a", "c"], [0, 0, 1, 2], num_images=3)
    out = retrieval_recall(torch.eye(3, 4), torch.eye(4), relevance, ks=(1, 2))
    sides = {"image_to_text": relevance.texts_of_images(0, 3), "text_to_image": relevance.images_of_texts(0, 4)}
    for (side, right), k in itertools.product(sides.items(), (1, 2)):
        orders = list(itertools.permutations(range(right.shape[1])))
        hits = [bool(row[list(order[:k])].any()) for row in right for order in orders]
        assert out[f"{side}_chance_R@{k}"] == pytest.approx(sum(hits) / len(hits))


def test_one_embedding_for_everything_scores_nothing():
    relevance = relevance_of([str(n) for n in range(8)], range(8), num_images=8)
    out = retrieval_recall(torch.ones(8, 3), torch.ones(8, 3), relevance)
    assert out["image_to_text_R@1"] == out["text_to_image_R@5"] == 0.0 and out["text_to_image_R@10"] == 1.0
    assert top_k_accuracy(torch.ones(4, 3), torch.ones(6, 3), torch.arange(4)) == {1: 0.0, 5: 0.0}


def test_memory_of_recall_does_not_grow_with_the_queries():
    shapes = []
    n = 500
    relevance = relevance_of([str(i) for i in range(n)], range(n), num_images=n)

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                shapes.append(out.numel())
            return out

    with Spy():
        retrieval_recall(torch.randn(n, 4), torch.randn(n, 4), relevance, chunk_size=10)
    assert 10 * n in shapes and max(shapes) <= 10 * n


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**31))
def test_accuracy_equals_topk(num_classes: int, num: int, chunk_size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    a, w = torch.randn(num, 4, generator=generator), torch.randn(num_classes, 4, generator=generator)
    labels = torch.randint(num_classes, (num,), generator=generator)
    out = top_k_accuracy(a, w, labels, chunk_size=chunk_size)
    for k in (1, 5):
        best = (a @ w.T).topk(min(k, num_classes)).indices
        assert out[k] == pytest.approx((best == labels[:, None]).any(dim=1).double().mean().item())


def test_classifier_is_the_normalised_mean_of_normalised_prompts():
    table = {"a cat": [3.0, 0.0], "a cat.": [0.0, 5.0], "a {0} dog": [-1.0, 0.0], "a {0} dog.": [-2.0, 0.0]}
    seen: list[list[str]] = []

    def tokenizer(prompts: list[str]) -> Tensor:
        seen.append(prompts)
        return torch.tensor([list(table).index(p) for p in prompts])

    def encode(tokens: Tensor) -> Tensor:
        return torch.tensor(list(table.values()), requires_grad=True)[tokens].half()

    weights = zero_shot_weights(encode, tokenizer, ["cat", "{0} dog"], ["a {}", "a {}."], batch_size=3)
    # lengths 3 and 5 must not weigh
    torch.testing.assert_close(weights, torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [-1.0, 0.0]]))
    assert [len(prompts) for prompts in seen] == [3, 1] and not weights.requires_grad


def test_bad_arguments_of_the_metrics_are_refused():
    nothing: Any = None
    a, labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    relevance = relevance_of(["a", "b", "c"], [0, 1, 2], num_images=3)
    cases = [
        (lambda: top_k_accuracy(torch.ones(0, 2), a, labels[:0]), "image_features must be .*not empty"),
        (lambda: top_k_accuracy(a, torch.ones(3, 4), labels), "share their last dimension"),
        (lambda: top_k_accuracy(a * torch.nan, a, labels), "image_features must be finite, got 6"),
        (lambda: top_k_accuracy(a, a, labels + 3), r"labels must be in \[0, 3\), got 3 to 3"),
        (lambda: top_k_accuracy(a, a, labels[:2]), r"labels must be int64 \[3\]"),
        (lambda: top_k_accuracy(a, a, labels, ks=()), "ks must be at least one rank"),
        (lambda: retrieval_recall(a, a[:2], relevance), "of 3 images and 3 texts, got 3 and 2"),
        (lambda: retrieval_recall(a, a * torch.inf, relevance), "text_features must be finite"),
        (lambda: retrieval_recall(a, a, relevance, ks=(0,)), "each at least 1, got"),
        (lambda: relevance_of(["a"], [0], num_images=2), "each image must have a caption, got none for image 1"),
        (lambda: relevance_of(["a"], [1], num_images=1), r"image_index must be in \[0, 1\), got up to 1"),
        (lambda: relevance_of(["a"], [0, 0], num_images=1), "one image for each caption"),
        (lambda: zero_shot_weights(nothing, nothing, [], ["{}"]), "class_names must be"),
        (lambda: zero_shot_weights(nothing, nothing, ["a"], "a {}"), "templates must be a list"),
        (lambda: zero_shot_weights(nothing, nothing, ["a"], ["a cat"]), "templates must hold {}"),
    ]
    for call, match in cases:
        refuses(match, call)
