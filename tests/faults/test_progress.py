"""The numbers of a run's progress: read seldom, of the device, and the run stops where they are not finite."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.data import StepBatch
from mmcore.train import trainer
from mmcore.train.accumulate import plain_backward
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig
from mmcore.train.run import peak_memory
from tests.waits import Waits

NAN, INF = float("nan"), float("inf")


class Batches:
    steps_per_epoch = 1000

    def __init__(self) -> None:
        self.step = 0

    def __next__(self) -> StepBatch:
        self.step += 1
        return StepBatch((), 0, [f"record {self.step}"])


@pytest.fixture
def run_of(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a loop over steps with these losses and norms of the gradient; what it did goes into a list, in order."""
    monkeypatch.setattr(trainer, "seed_step", lambda *_: 0)
    monkeypatch.setattr(trainer.dist, "get_world_size", lambda: 1)

    def run(done: list[str], losses: list[float], norms: dict[int, float] | None = None, **config: Any) -> None:
        def log(step: int, values: dict[str, float], note: str) -> None:
            done.append(f"log {step}: {values['loss']:.0f} {values['grad_norm']:.0f}")

        def step_taken(*_: Any, step: int, **__: Any) -> Tensor:
            return torch.tensor((norms or {}).get(step + 1, 1.0))

        engine: Any = SimpleNamespace(device=torch.device("cpu"), step=step_taken)
        recipe: Any = SimpleNamespace(run=RunConfig(**config), optim=OptimConfig(), after_step=lambda *_: None)
        recipe.backward = lambda engine, parts, step: {"loss": torch.tensor(losses[step.number])}
        metrics: Any = SimpleNamespace(advance=lambda *_: None, log=log)

        def evaluate() -> dict[str, float]:
            done.append("evaluate")
            return {"accuracy": 0.5}

        loader: Any = Batches()
        loop = trainer.Loop(tmp_path, recipe, engine, loader, metrics, len(losses), {}, evaluate)
        monkeypatch.setattr(loop, "_save", lambda step: done.append(f"save {step}"))
        with Waits() as waits:
            loop(0)
        done.append(f"{sum(waits.lines.values())} reads")

    return run


def test_losses_are_read_where_something_is_logged_and_nowhere_else(run_of):
    done: list[str] = []
    run_of(done, [float(i) for i in range(1, 13)], log_every=4, eval_every=12)
    assert done == ["log 4: 4 1", "log 8: 8 1", "evaluate", "log 12: 12 1", "save 12", "3 reads"]


def test_no_checkpoint_is_written_before_the_first_step(run_of):
    done: list[str] = []
    run_of(done, [1.0, 2.0], log_every=9, save_every=1, eval_every=9)
    assert done[0] == "save 1"


@pytest.mark.parametrize(("value", "norm", "message"), [
    (NAN, 1.0, "step 3: the loss is nan; the run stops and saves nothing more"),
    (-INF, 1.0, "step 3: the loss is -inf"),
    (1.0, INF, "step 3: the gradient norm is inf"),
    (NAN, NAN, "step 3: the loss is nan"),
])  # fmt: skip
@pytest.mark.parametrize("every", [{"log_every": 5}, {"save_every": 4}, {"eval_every": 4}])
def test_a_number_that_is_not_finite_stops_the_run_before_anything_is_logged_measured_or_saved(
    run_of, value, norm, message, every
):
    """And it is named by its own step and records, though it is read later."""
    done: list[str] = []
    losses = [1.0, 1.0, value, *[NAN] * 9]  # what follows is not finite either
    with pytest.raises(FloatingPointError, match=message) as error:
        run_of(done, losses, {3: norm}, **{"log_every": 100, "eval_every": 100, "save_every": 100, **every})
    assert "at the records record 3..." in str(error.value) and not done


def test_losses_are_read_now_and_then_where_hardly_anything_is_logged(run_of):

    class Long(list):
        """Only the first of its losses may be asked for."""

        def __len__(self) -> int:
            return 10_000

    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        run_of([], Long([1.0, *[NAN] * 120]), log_every=10_000, eval_every=10_000, save_every=10_000)


def test_micro_batches_of_different_weight_are_joined_without_waiting_for_the_device():
    weight, summed = torch.ones(3, requires_grad=True), []
    model: Any = SimpleNamespace(device=weight.device, place=lambda x: x, accumulate=contextlib.nullcontext)
    model.backward = lambda loss, last: (summed.append(last), loss.backward())
    recipe: Any = SimpleNamespace(weight=lambda x: (x != 0).sum())
    recipe.loss = lambda model, x, step: {"loss": (weight * x).sum() / (x != 0).sum(), "other": x.max()}
    parts = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2.0, 3.0, 4.0])]
    with Waits() as waits:
        losses = plain_backward(recipe, model, parts, None)
    assert not waits.lines and summed == [False, True]
    assert {name: x.item() for name, x in losses.items()} == {"loss": 2.5, "other": 3.25}  # a quarter and three
    torch.testing.assert_close(weight.grad, torch.tensor([3.0, 3.0, 4.0]) / 4)


def test_memory_is_that_of_the_gpu_where_the_model_is_on_one(monkeypatch):
    assert peak_memory(torch.device("cpu")).startswith("host ")
    for name, value in (("max_memory_allocated", 3 << 30), ("max_memory_reserved", 5 << 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert peak_memory(torch.device("cuda", 0)) == "GPU 3.0 GB (5.0 reserved)"


def test_a_step_that_fails_on_weights_that_are_not_finite_names_the_step_that_made_them_so(run_of, monkeypatch):
    """On a CPU losses look at their scale, and refuse it at the step after."""
    taken = trainer.Loop._step

    def step(self: Any, number: int, batch: Any) -> Any:
        if number == 3:
            raise ValueError("contrastive: logit_scale must be finite, got nan")
        return taken(self, number, batch)

    monkeypatch.setattr(trainer.Loop, "_step", step)
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        run_of([], [1.0, 1.0, NAN, 1.0], log_every=100)
    with pytest.raises(ValueError, match="logit_scale must be finite"):
        run_of([], [1.0, 1.0, 1.0, 1.0], log_every=100)
