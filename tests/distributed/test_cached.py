"""Cached steps on several ranks against one process with the whole batch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import cached
from tests.distributed.launch import run_ranks


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks("worker_cached", request.param, tmp_path_factory.mktemp("cached"))


def whole(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch without chunks, and its gradients."""
    model = cached.Encoder(dtype=dtype)
    encoders, inputs, loss = cached.cases(model, model.logit_scale, slice(None))[name]
    features: list[Tensor] = []
    for encoder, x in zip(encoders, inputs, strict=True):
        found = encoder(**x) if isinstance(x, dict) else encoder(*x) if isinstance(x, tuple) else encoder(x)
        features += found if isinstance(found, tuple) else [found]
    value = loss(*features)
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(found: dict[str, Any], name: str, bound: float, dtype: torch.dtype = torch.float64) -> None:
    value, gradients = whole(name, dtype)
    assert abs(found["loss"] - value.item()) < bound
    for parameter, expected in gradients.items():
        grad = torch.tensor(found["gradients"][parameter], dtype=dtype)
        assert expected.abs().max() > 1e-4 and (grad - expected).abs().max() < bound * expected.abs().max(), parameter


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "accelerate"])
def test_the_gradient_is_that_of_one_process_on_the_whole_batch(results, kind) -> None:
    for result in results:
        for name, found in result.get(kind, {}).items():
            check(found, name, 1e-10)


@pytest.mark.parametrize("results", [2], indirect=True)
def test_deepspeed_takes_the_same_step_under_each_stage(results) -> None:
    assert len(results[0]["zero"]) == 4
    for found in results[0]["zero"].values():
        check(found, "pairs", 1e-5, torch.float32)


def test_sentence_transformers_loss_is_that_of_the_whole_batch(results) -> None:
    model, texts = cached.Encoder(), cached.batch()[1]
    embedded = [F.normalize(model.text(x).mean(1), dim=-1) for x in (texts, texts.flip(1) // 2, texts // 3)]
    loss = F.cross_entropy(20.0 * embedded[0] @ torch.cat(embedded[1:]).T, torch.arange(cached.NUM))
    (expected,) = torch.autograd.grad(loss, [model.text.weight])
    for result in results:
        assert abs(result["ranking"]["loss"] - loss.item()) < 1e-10
        found = torch.tensor(result["ranking"]["gradient"], dtype=torch.float64)
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_assignments_of_all_ranks_have_the_losses_and_the_gradient_of_one_process(results) -> None:
    a, b = (x.requires_grad_() for x in cached.logits())
    p, q = a.softmax(1), b.softmax(1)

    def cross(x: Tensor, y: Tensor) -> Tensor:
        return -(x * y.log()).sum(-1).mean()

    agreement, entropy = (cross(p, q) + cross(q, p)) / 2, (cross(p, p) + cross(q, q)) / 2
    expected = [agreement, entropy, (cross(p.mean(0), p.mean(0)) + cross(q.mean(0), q.mean(0))) / 2]
    total: Any = sum(w * x for w, x in zip(cached.WEIGHTS, expected, strict=True))
    grads = torch.autograd.grad(total, [a, b])
    found = [result["assignment"] for result in results]
    for of_rank in found:
        assert all(abs(x - y.item()) < 1e-12 for x, y in zip(of_rank["losses"], expected, strict=True))
    for side, grad in enumerate(grads):
        whole = torch.cat([torch.tensor(x["grads"][side], dtype=torch.float64) for x in found]) / len(found)
        assert (whole - grad).abs().max() < 1e-12


@pytest.mark.parametrize("layout", [0, 1])
def test_self_distillation_of_all_ranks_is_that_of_one_process_with_a_rank_without_rows_too(results, layout) -> None:
    found = [result["distilled"][layout] for result in results]
    for name, (expected, grad) in cached.distilled(slice(None)).items():
        assert all(abs(of_rank[name][0] - expected.item()) < 1e-12 for of_rank in found), name
        parts = [torch.tensor(of_rank[name][1], dtype=torch.float64).view(-1, 7) for of_rank in found]
        assert (torch.cat(parts) / len(found) - grad).abs().max() < 1e-11, name
    mean = 0.1 * cached.logits()[1].mean(0)
    assert all((torch.tensor(x["centre"], dtype=torch.float64) - mean).abs().max() < 1e-15 for x in found)


def test_a_mistake_of_one_rank_is_an_error_on_all(results) -> None:
    *others, odd = (result["refused"] for result in results)
    said = "cached_contrastive_step: inputs[0] must have as many rows in all of its parts, got [11, 10]"
    assert odd == said and all(x.endswith(f"refused its arguments: {said}") for x in others)
