"""LLaVA-NeXT under ZeRO 0 and 3 on 2 ranks, one of which has no images, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.train.optim import OptimConfig, make_optimizer, param_groups
from tests.distributed import llava
from tests.distributed.launch import run_ranks

STEPS = 2
RATES = {"projector.": 0.1, "visual.": 0.01}
RUNS: list[dict[str, Any]] = [
    {"id": "zero0", "zero": 0, "trainable": "all", "tied": False},
    {"id": "projector", "zero": 3, "trainable": "projector", "tied": False},
    {"id": "language", "zero": 3, "trainable": "language", "tied": False},
    {"id": "all", "zero": 3, "trainable": "all", "tied": False},
    {"id": "parts0", "zero": 0, "trainable": "language", "tied": False, "accum": 2},
    {"id": "parts3", "zero": 3, "trainable": "projector", "tied": False, "accum": 2},
    {"id": "tied", "zero": 3, "trainable": "language", "tied": True},
    {"id": "lora2", "zero": 2, "trainable": "language", "tied": False, "lora": True, "rates": RATES},
    {"id": "lora3", "zero": 3, "trainable": "all", "tied": False, "lora": True, "rates": RATES},
]


def trained(run: dict[str, Any]) -> dict[str, Any]:
    """One process in plain PyTorch on the whole batch."""
    optim = OptimConfig(lr=1e-2)
    model = llava.model(run["trainable"], tied=run["tied"], lora=run.get("lora", False))
    optimizer = make_optimizer(param_groups(model, optim.weight_decay, run.get("rates", {})), optim)
    for group in optimizer.param_groups:
        group["lr"] = optim.lr * group["lr_scale"]
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count = model("loss", *llava.batch(step, range(2), model.config))
        loss = total / count
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tokens, _, images, sizes = llava.batch(0, range(2), model.config)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = model.eval()("generate", tokens, torch.full((4,), tokens.shape[1]), images, sizes, **options)
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "ids": ids.tolist(), "weight": named}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("llava")
    return folder, run_ranks("worker_llava", 2, folder, runs=[{**run, "steps": STEPS} for run in RUNS])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["id"])
def test_a_rank_without_images_trains_with_the_others_as_one_process(
    runs: tuple[Path, list[dict[str, Any]]], run: dict[str, Any]
) -> None:
    folder, results = runs
    truth, name = trained(run), run["id"]
    for result in results:
        assert result[name]["losses"] == pytest.approx(truth["losses"], rel=1e-5)
    assert results[0][name]["ids"] + results[1][name]["ids"] == truth["ids"]
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    assert found.keys() == truth["weight"].keys()
    for n, x in truth["weight"].items():
        torch.testing.assert_close(found[n], x, rtol=0, atol=2e-5, msg=n)
