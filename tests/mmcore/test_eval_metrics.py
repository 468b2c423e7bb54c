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

# two images, three captions: unit vectors in the plane, scores are cosines of the angles between
ANGLES_IMAGES = [0.0, 90.0]
ANGLES_TEXTS = [10.0, 60.0, 20.0]


def unit(degrees: list[float]) -> Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def brute_force(scores: Tensor, captions: list[str], images: list[int], k: int) -> tuple[float, float]:
    """R@k of both directions by sorting, for scores [I, N] without ties."""
    num_images = len(scores)
    texts_of = [{captions[n] for n in range(len(captions)) if images[n] == i} for i in range(num_images)]
    i2t = [
        any(captions[n] in texts_of[i] for n in scores[i].argsort(descending=True)[:k].tolist())
        for i in range(num_images)
    ]
    t2i = [
        any(captions[n] in texts_of[i] for i in scores[:, n].argsort(descending=True)[:k].tolist())
        for n in range(len(captions))
    ]
    return sum(i2t) / len(i2t), sum(t2i) / len(t2i)


def test_recall_of_a_case_worked_by_hand():
    # image 0 (0 deg) ranks texts 10, 20, 60; image 1 (90 deg) ranks 60, 20, 10. The 20 deg text belongs to
    # image 1, the others to image 0
    relevance = relevance_of(["a", "b", "c"], [0, 0, 1], num_images=2)
    out = retrieval_recall(unit(ANGLES_IMAGES), unit(ANGLES_TEXTS), relevance, ks=(1, 2, 3))
    # image 0 hits at once; image 1 finds its 20 deg text second
    assert [out[f"image_to_text_R@{k}"] for k in (1, 2, 3)] == [0.5, 1.0, 1.0]
    # text 10 -> image 0 right; text 60 -> image 1 wrong; text 20 -> image 0 wrong
    assert [out[f"text_to_image_R@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 1.0, 1.0])
    # image 0 has 2 of 3 texts: chance 2/3 at 1; image 1 has 1 of 3
    assert out["image_to_text_chance_R@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert out["image_to_text_chance_R@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert out["text_to_image_chance_R@1"] == pytest.approx(0.5) and out["text_to_image_chance_R@3"] == 1.0


def test_equal_captions_share_their_images():
    relevance = relevance_of(["A cat ", "b", "a  CAT"], [0, 0, 1], num_images=2)
    assert relevance.texts_of_images(0, 2).tolist() == [[True, True, True], [True, False, True]]
    assert relevance.images_of_texts(0, 3).tolist() == [[True, True], [True, False], [True, True]]
    assert relevance.images_of_texts(1, 3).tolist() == [[True, False], [True, True]]
    out = retrieval_recall(unit(ANGLES_IMAGES), unit(ANGLES_TEXTS), relevance, ks=(1,))
    # now only the 60 deg text, whose nearest image is the second, is wrong, and image 1 finds it first
    assert out["text_to_image_R@1"] == pytest.approx(2 / 3) and out["image_to_text_R@1"] == 0.5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_recall_equals_brute_force_for_any_relevance_and_chunk(data: st.DataObject):
    num_images = data.draw(st.integers(1, 6))
    extra = data.draw(st.lists(st.integers(0, num_images - 1), max_size=8))
    images = [*range(num_images), *extra]
    captions = data.draw(st.lists(st.sampled_from("abcdef"), min_size=len(images), max_size=len(images)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    a = torch.randn(num_images, 5, generator=generator)
    b = torch.randn(len(images), 5, generator=generator)
    relevance = relevance_of(captions, images, num_images=num_images)
    out = retrieval_recall(a, b, relevance, ks=(1, 2, 5), chunk_size=data.draw(st.integers(1, 7)))
    for k in (1, 2, 5):
        expected = brute_force(a @ b.T, captions, images, k)
        assert (out[f"image_to_text_R@{k}"], out[f"text_to_image_R@{k}"]) == pytest.approx(expected)


def test_chance_equals_the_mean_over_every_order():
    captions, images = ["a", "b", "a", "c"], [0, 0, 1, 2]
    relevance = relevance_of(captions, images, num_images=3)
    right = relevance.texts_of_images(0, 3)
    out = retrieval_recall(torch.eye(3, 4), torch.eye(4), relevance, ks=(1, 2))
    orders = list(itertools.permutations(range(4)))
    for k in (1, 2):
        hits = [bool(right[i, list(order[:k])].any()) for i in range(3) for order in orders]
        assert out[f"image_to_text_chance_R@{k}"] == pytest.approx(sum(hits) / len(hits))


def test_random_embeddings_score_the_chance_level():
    torch.manual_seed(0)
    captions = [f"caption {n % 150}" for n in range(600)]
    relevance = relevance_of(captions, [n % 200 for n in range(600)], num_images=200)
    runs = [retrieval_recall(torch.randn(200, 32), torch.randn(600, 32), relevance) for _ in range(20)]
    for key in runs[0]:
        if "chance" not in key:
            chance = runs[0][key.replace("_R@", "_chance_R@")]
            mean = sum(run[key] for run in runs) / len(runs)
            # 4,000 or more draws, correlated within a run: five standard errors of 400 independent ones
            assert abs(mean - chance) < 5 * math.sqrt(chance * (1 - chance) / 400), key


def test_one_embedding_for_everything_scores_nothing():
    captions = [str(n) for n in range(8)]
    out = retrieval_recall(torch.ones(8, 3), torch.ones(8, 3), relevance_of(captions, range(8), num_images=8))
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


def test_accuracy_of_a_case_worked_by_hand():
    # classes at 0, 90, 180 degrees; nearest to 10 is class 0, to 100 class 1 then 2, to 170 class 2 then 1
    out = top_k_accuracy(unit([10, 100, 170]), unit([0, 90, 180]), torch.tensor([0, 2, 0]), ks=(1, 2, 3, 9))
    assert out == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0, 9: 1.0})


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
