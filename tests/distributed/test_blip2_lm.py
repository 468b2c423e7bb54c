"""BLIP-2's second stage under ZeRO 0 to 3 on 2 ranks, one of which has no pictures, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.systems.blip2.steps import stage2_backward
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups
from tests.distributed import blip2_lm
from tests.distributed.launch import run_ranks

STEPS = 3


class Plain:
    """A model without an engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, *inputs: Any) -> Any:
        return self.model(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def trained(language: torch.dtype = torch.float32) -> dict[str, Any]:
    """One process in plain PyTorch on the whole batch."""
    optim = OptimConfig(lr=1e-2, ema=0.99)
    model = blip2_lm.model(language)
    optimizer = make_optimizer(param_groups(model, optim.weight_decay), optim)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        images, texts, has_image = blip2_lm.batch(step)
        losses.append(float(stage2_backward(Plain(model), images, texts, has_image)["loss"]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    images, texts, _ = blip2_lm.batch(0)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    ids = model.eval().generate(images, texts.tokens[:, :2], torch.full((blip2_lm.B,), 2), **options)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {
        "losses": losses,
        "ids": ids.tolist(),
        "weight": {n: p.detach() for n, p in named.items()},
        "ema": {n: optimizer.state[p]["ema"] for n, p in named.items()},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("blip2_lm")
    settings = [{"id": f"zero{z}", "zero": z, "steps": STEPS} for z in range(4)]
    settings += [{"id": f"half{z}", "zero": z, "steps": STEPS, "language": "bfloat16"} for z in (1, 3)]
    settings += [{"id": "bf16", "zero": 3, "steps": STEPS, "precision": "bf16", "language": "bfloat16"}]
    return folder, run_ranks("worker_blip2_lm", 2, folder, runs=settings)


@pytest.mark.parametrize(
    ("name", "language"),
    [*((f"zero{z}", "float32") for z in range(4)), ("half1", "bfloat16"), ("half3", "bfloat16")],
)
def test_a_rank_without_pictures_trains_with_the_others_as_one_process(
    runs: tuple[Path, list[dict[str, Any]]], name: str, language: str
) -> None:
    folder, results = runs
    truth = trained(getattr(torch, language))
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    tolerance = 1e-5 if language == "float32" else 5e-3
    for result in results:
        assert result[name]["losses"] == pytest.approx(truth["losses"], rel=tolerance)
        if language == "float32":
            assert result[name]["ids"] == truth["ids"]
    for key in ("weight", "ema"):
        assert found[key].keys() == truth[key].keys()
        for n, x in truth[key].items():
            torch.testing.assert_close(found[key][n], x, rtol=0, atol=2 * tolerance, msg=f"{key} {n}")


def test_what_is_frozen_is_neither_in_the_optimizer_nor_in_a_checkpoint_and_keeps_its_type(
    runs: tuple[Path, list[dict[str, Any]]],
) -> None:
    frozen = ("visual.", "language_model.", "language_head.")
    for name, result in runs[1][0].items():
        assert result["saved"] and not any(x.startswith(frozen) for x in result["saved"]), name
        assert result["language"] == ["torch.float32" if name.startswith("zero") else "torch.bfloat16"]
    sizes = sum(p.numel() for p in blip2_lm.model().parameters() if p.requires_grad)
    assert runs[1][0]["zero0"]["trained"] == sizes


def test_bf16_learns_under_zero_3(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    losses = runs[1][0]["bf16"]["losses"]
    assert losses == pytest.approx(trained()["losses"], rel=0.05)
