"""Training under ZeRO 0 to 3 on 2 ranks against one process in plain PyTorch."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore.train.optim import make_optimizer, param_groups, weight_decay_schedule
from tests.distributed import tiny
from tests.distributed.launch import run_ranks

STEPS = 5
FROZEN_UNTIL, RATE = 2, 0.5
# What is trained otherwise than by AdamW: its settings, the steps that the text tower is frozen for.
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "sgd": ({"optimizer": "sgd", "lr": 1.0, "clip_each": 0.02}, 0), "lars": ({"optimizer": "lars", "lr": 10.0}, 0),
    "muon": ({"optimizer": "muon"}, 0), "frozen": ({"weight_decay": 0.04, "weight_decay_end": 0.4}, FROZEN_UNTIL),
}  # fmt: skip


@functools.cache
def truth_of(name: str) -> dict[str, Any]:
    """Plain PyTorch in float64 on the whole batch: the same recipe without DeepSpeed, ranks or blocks."""
    settings, frozen_until = OTHERS.get(name, ({}, 0))
    optim = tiny.optim(settings)
    model = tiny.TwoTower(torch.float64)
    optimizer = make_optimizer(param_groups(model, optim, tiny.rules(frozen_until)), optim)
    losses, norms = [], []
    for step in range(STEPS):
        images, tokens = tiny.batch(8, step, torch.float64)
        loss = tiny.eager_loss(*model(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        if step < frozen_until:
            model.text.zero_grad()
        for group in optimizer.param_groups:
            if group["params"][0].ndim > 1:
                group["weight_decay"] = weight_decay_schedule(optim, tiny.TOTAL)(step)
            if frozen_until and group["params"][0] is not model.embed.weight:
                group["lr"] = RATE * optim.lr
        most = 1.0 if optim.clip_each is None else float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), most)))
        optimizer.step()
        losses.append(loss.item())
    named = dict(model.named_parameters())
    states = {key: {n: optimizer.state[p].get(key) for n, p in named.items()} for key in optimizer.state_keys}
    found = {"weight": {n: p.detach() for n, p in named.items()}, **states}
    held = {key: {n: x for n, x in tensors.items() if x is not None} for key, tensors in found.items()}
    return {"losses": losses, "norms": norms, **held}


def farthest(state: dict, truth: dict, key: str) -> float:
    assert state[key].keys() == truth[key].keys()
    return max(float((state[key][n].double() - t).abs().max()) for n, t in truth[key].items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("engine")
    settings: list[dict[str, Any]] = [
        {"id": f"adamw-zero{z}-accum{a}", "zero": z, "accum": a, "steps": STEPS} for z in range(4) for a in (1, 2)
    ]
    for name, (optim, until) in OTHERS.items():
        common = {"optim": optim, "frozen_until": until, "steps": STEPS, "rate": RATE if until else 1.0}
        settings += [{"id": f"{name}-zero{z}-accum1", "zero": z, **common} for z in range(4)]
    short = {"frozen_until": FROZEN_UNTIL, "steps": FROZEN_UNTIL}
    settings += [{"id": f"short-zero{z}", "zero": z, **short} for z in range(4)]
    return folder, run_ranks("worker_engine", 2, folder, runs=settings)


@pytest.mark.parametrize(("name", "accum"), [("adamw", 1), ("adamw", 2), *((name, 1) for name in OTHERS)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_train_as_one_process(runs, zero, name, accum):
    folder, results = runs
    run, truth = f"{name}-zero{zero}-accum{accum}", truth_of(name)
    state = torch.load(folder / f"{run}.pt", weights_only=True)
    for result in results:  # every rank reports the loss of the global batch
        torch.testing.assert_close(result[run]["losses"], truth["losses"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result[run]["norms"], truth["norms"], rtol=1e-5, atol=1e-5)
    assert state.keys() | {"losses", "norms"} == truth.keys()
    # Adam divides by the root of the second moment: near-zero gradients amplify fp32 rounding up to lr = 1e-2
    # times their relative error, so weights are held to 1 % of one step.
    for key in state:
        assert farthest(state, truth, key) < 1e-4


def test_a_step_that_is_not_the_one_that_is_due_is_refused(runs):
    assert runs[1][0]["adamw-zero1-accum1"]["error"] == (
        f"Engine.step: step must be {STEPS}, the one that is due, got {STEPS - 1}"
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_frozen_parameters_stay_to_the_bit_without_moments_or_gradient(runs, zero):
    state = torch.load(runs[0] / f"short-zero{zero}.pt", weights_only=True)
    for name, p in tiny.TwoTower().named_parameters():
        frozen = name.startswith("text.")
        assert torch.equal(state["weight"][name], p) == torch.equal(state["ema"][name], p) == frozen
        assert (state["exp_avg"][name].count_nonzero() == 0) == frozen
