"""Training under ZeRO 0 to 3 on 2 ranks against one process in plain PyTorch, and against itself after a resume."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcore import checkpoint
from mmcore.train.optim import make_optimizer, param_groups, weight_decay_schedule
from mmcore.train.state import read_state
from tests.distributed import tiny
from tests.distributed.launch import run_ranks

WHOLE, HALF = 5, 3
STAGES = range(4)
# the text tower is still frozen when a run is saved
FROZEN = {"optim": {"weight_decay": 0.04, "weight_decay_end": 0.4}, "frozen_until": HALF + 1, "rate": 0.5}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {}, "accum": {"accum": 2}, "frozen": FROZEN,
    "sgd": {"optim": {"optimizer": "sgd", "lr": 1.0, "clip_each": 0.02}},
    "lars": {"optim": {"optimizer": "lars", "lr": 10.0}},
    "muon": {"optim": {"optimizer": "muon", "weight_decay_end": 0.4}},
}  # fmt: skip
RUNS = {f"{name}-zero{zero}": {"zero": zero, **recipe} for name, recipe in RECIPES.items() for zero in STAGES}
RUNS |= {f"bf16-zero{zero}": {"zero": zero, "precision": "bf16"} for zero in (1, 3)}
RUNS["bf16-frozen"] = {"zero": 1, "precision": "bf16", **FROZEN}
POISONED = {f"poisoned-{precision}-zero{zero}": {"zero": zero, "precision": precision, "poison": 1, "steps": 2}
            for precision, stages in (("fp32", STAGES), ("bf16", (1, 2, 3))) for zero in stages}  # fmt: skip
RESUMED = [name for name in RUNS if name.startswith(("adamw", "frozen", "bf16"))] + [
    "sgd-zero2",
    "lars-zero1",
    "muon-zero1",
]
MOVES = [(0, 3), (1, 1), (2, 2), (3, 3), (3, 0), (1, 2)]
Runs = tuple[Path, list[dict[str, Any]]]


@functools.cache
def truth_of(name: str) -> dict[str, Any]:
    """Plain PyTorch in float64 on the whole batch: the same recipe without DeepSpeed, ranks or blocks."""
    recipe = RECIPES[name]
    optim, frozen_until = tiny.optim(recipe.get("optim", {})), recipe.get("frozen_until", 0)
    model = tiny.TwoTower(torch.float64)
    optimizer = make_optimizer(param_groups(model, optim, tiny.rules(frozen_until)), optim)
    losses, norms = [], []
    for step in range(WHOLE):
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
                group["lr"] = recipe["rate"] * optim.lr
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
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Unbroken runs on 2 ranks, and those that go on from where some of them were saved half-way."""
    folder = tmp_path_factory.mktemp("engine")
    settings = []
    for name, run in (RUNS | POISONED).items():
        settings.append({"id": name, "steps": WHOLE, **run})
        if name in RESUMED:
            settings[-1] |= {"save_at": HALF, "save": str(folder / name)}
            settings.append({"id": f"{name}-resumed", "steps": WHOLE, "resume": str(half_of(folder, name)), **run})
    return folder, run_ranks("worker_engine", 2, folder, runs=settings)


@pytest.fixture(scope="module")
def elsewhere(runs: Runs) -> Runs:
    """Each stage's checkpoint, continued by one process at another stage."""
    folder = runs[0] / "elsewhere"
    settings = [
        {"id": f"{a}-to-{b}", "zero": b, "steps": WHOLE, "resume": str(half_of(runs[0], f"adamw-zero{a}"))}
        for a, b in MOVES
    ]
    return folder, run_ranks("worker_engine", 1, folder, runs=settings)


def half_of(folder: Path, run: str) -> Path:
    return checkpoint.step_folder(folder / run, HALF)


def state(folder: Path, run: str) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / f"{run}.pt", weights_only=True)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_train_as_one_process(runs: Runs, zero: int, name: str) -> None:
    folder, results = runs
    run, truth = f"{name}-zero{zero}", truth_of(name)
    found = state(folder, run)
    for result in results:  # every rank reports the loss of the global batch
        torch.testing.assert_close(result[run]["losses"], truth["losses"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result[run]["norms"], truth["norms"], rtol=1e-5, atol=1e-5)
    assert found.keys() | {"losses", "norms"} == truth.keys()
    # Adam divides by the root of the second moment: near-zero gradients amplify fp32 rounding up to lr = 1e-2
    # times their relative error, so weights are held to 1 % of one step.
    for key in found:
        assert farthest(found, truth, key) < 1e-4


def test_no_step_waits_for_the_device_but_where_ranks_tell_each_other_their_sizes(runs: Runs) -> None:
    lines = {line.split(":")[0] for result in runs[1] for run in RUNS for line in result[run]["waits"]}
    assert lines == {"mmcore/losses/ranks.py"}


@pytest.mark.parametrize("name", POISONED)
def test_a_gradient_that_is_not_finite_has_a_norm_that_is_not_on_every_rank(runs: Runs, name: str) -> None:
    """Though DeepSpeed skips the step without a word (DeepSpeed#8415)."""
    for result in runs[1]:
        first, second = result[name]["norms"]
        assert math.isfinite(first) and not math.isfinite(second)


def test_a_step_that_is_not_the_one_that_is_due_is_refused(runs: Runs) -> None:
    assert runs[1][0]["adamw-zero1"]["error"] == (
        f"Engine.step: step must be {WHOLE}, the one that is due, got {WHOLE - 1}"
    )


@pytest.mark.parametrize("zero", STAGES)
def test_frozen_parameters_stay_to_the_bit_without_moments_or_gradient(runs: Runs, zero: int) -> None:
    saved = half_of(runs[0], f"frozen-zero{zero}")
    weight, ema, exp_avg = (dict(checkpoint.tensors(saved, key)) for key in ("weight", "ema", "exp_avg"))
    for name, p in tiny.TwoTower().named_parameters():
        frozen = name.startswith("text.")
        assert torch.equal(weight[name], p) == torch.equal(ema[name], p) == frozen
        assert (exp_avg[name].count_nonzero() == 0) == frozen


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_bit_equal_to_an_unbroken_one(runs: Runs, name: str) -> None:
    folder, results = runs
    assert results[0][f"{name}-resumed"]["losses"] == results[0][name]["losses"][HALF:]
    whole, resumed = state(folder, name), state(folder, f"{name}-resumed")
    assert whole.keys() == resumed.keys()
    for key, tensors in whole.items():
        for parameter, value in tensors.items():
            assert torch.equal(value, resumed[key][parameter]), (key, parameter)


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_checkpoint_moves_to_another_stage_and_number_of_ranks(
    runs: Runs, elsewhere: Runs, move: tuple[int, int]
) -> None:
    whole, moved = f"adamw-zero{move[0]}", f"{move[0]}-to-{move[1]}"
    expected = runs[1][0][whole]["losses"][HALF:]
    torch.testing.assert_close(elsewhere[1][0][moved]["losses"], expected, rtol=2e-6, atol=2e-6)
    for key in ("weight", "ema"):  # to 1 % of a step, lr = 1e-2
        assert farthest(state(elsewhere[0], moved), state(runs[0], whole), key) < 1e-4


def test_a_checkpoint_is_json_and_safetensors_and_a_damaged_one_is_refused_by_the_name_of_its_file(runs: Runs) -> None:
    written = half_of(runs[0], "adamw-zero2")
    assert {p.suffix for p in written.iterdir()} == {".json", ".safetensors"}
    assert read_state(written)["step"] == HALF and read_state(written)["note"] == "kept"
    path = written / "ema-00000.safetensors"
    data = path.read_bytes()
    for damaged, message in ((data[:-1], ""), (data[:-1] + bytes([data[-1] ^ 1]), ""), (None, " is missing")):
        checkpoint.verify(written)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"damaged: ema-00000.safetensors{message}"):
            checkpoint.verify(written)
        path.write_bytes(data)
