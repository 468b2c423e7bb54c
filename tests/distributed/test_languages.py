"""LLaVA-NeXT and BLIP-2's second stage under ZeRO on 2 ranks, one of which has no images, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.train.optim import make_optimizer
from tests.distributed import languages
from tests.distributed.launch import run_ranks

RATES = {"projector.": 0.1, "visual.": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    "llava-all": {"zero": 3, "trainable": "all"},
    "llava-parts0": {"zero": 0, "trainable": "language", "accum": 2},
    "llava-parts3": {"zero": 3, "trainable": "projector", "accum": 2},
    "llava-tied": {"zero": 3, "trainable": "language", "tied": True},
    "llava-lora2": {"zero": 2, "trainable": "language", "rates": RATES},
    "llava-lora3": {"zero": 3, "trainable": "all", "rates": RATES},
    "blip2-zero0": {"zero": 0},
    "blip2-zero3": {"zero": 3},
    "blip2-half1": {"zero": 1, "language": "bfloat16"},
    "blip2-half3": {"zero": 3, "language": "bfloat16"},
    "blip2-bf16": {"zero": 3, "language": "bfloat16", "precision": "bf16"},
}
RUNS = {
    name: {"id": name, "system": name.split("-")[0], "steps": 3 if name[0] == "b" else 2, **run}
    for name, run in RUNS.items()
}
Results = tuple[Path, list[dict[str, Any]]]


def trained(run: dict[str, Any]) -> dict[str, Any]:
    """One process in plain PyTorch on the whole batch."""
    model = languages.model_of(run)
    optimizer = make_optimizer(languages.groups_of(run, model), languages.OPTIM)
    for group in optimizer.param_groups:
        group["lr"] = languages.OPTIM.lr * group["lr_scale"]
    losses = []
    for step in range(run["steps"]):
        optimizer.zero_grad()
        loss = languages.loss_of(run, model, step)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids = languages.answers(run, model.eval(), getattr(model, "config", None), range(2))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    averages = {n: optimizer.state[p]["ema"] for n, p in named.items()}
    return {"losses": losses, "ids": ids, "weight": {n: p.detach() for n, p in named.items()}, "ema": averages}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("languages")
    return folder, run_ranks("worker_languages", 2, folder, runs=list(RUNS.values()))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "blip2-bf16"])
def test_a_rank_without_images_trains_with_the_others_as_one_process(results: Results, name: str) -> None:
    run = RUNS[name]
    truth, of_ranks = trained(run), [result[name] for result in results[1]]
    found = torch.load(results[0] / f"{name}.pt", weights_only=True)
    tolerance = 5e-3 if "language" in run else 1e-5
    for result in of_ranks:
        assert result["losses"] == pytest.approx(truth["losses"], rel=tolerance)
    if "language" not in run:
        assert of_ranks[0]["ids"] + of_ranks[1]["ids"] == truth["ids"]
    for key in ("weight", "ema"):
        assert found[key].keys() == truth[key].keys()
        for n, x in truth[key].items():
            torch.testing.assert_close(found[key][n], x, rtol=0, atol=2 * tolerance, msg=f"{key} {n}")


def test_what_is_frozen_is_neither_in_the_optimizer_nor_in_a_checkpoint_and_keeps_its_type(results: Results) -> None:
    found = {name: result for name, result in results[1][0].items() if name.startswith("blip2")}
    for name, result in found.items():
        frozen = ("visual.", "language_model.", "language_head.")
        assert result["saved"] and not any(x.startswith(frozen) for x in result["saved"]), name
        assert result["language"] == [f"torch.{RUNS[name].get('language', 'float32')}"]
    sizes = sum(p.numel() for p in languages.blip2().parameters() if p.requires_grad)
    assert found["blip2-zero0"]["trained"] == sizes


def test_bf16_learns_under_zero_3(results: Results) -> None:
    expected = trained(RUNS["blip2-zero3"])["losses"]
    assert results[1][0]["blip2-bf16"]["losses"] == pytest.approx(expected, rel=0.05)
