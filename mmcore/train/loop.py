"""The loop that every recipe shares: steps, logs, evaluations and checkpoints, resumed where it stopped."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.data import TrainLoader
from mmcore.train.engine import Engine
from mmcore.train.optim import OptimConfig, cosine_lr
from mmcore.train.run import Metrics, RunConfig, peak_memory
from mmcore.train.state import save_state

T = TypeVar("T")


def on_rank_zero(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and gives every rank its result, or its error."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (ValueError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]


def seed_step(seed: int, step: int) -> int:
    """Seeds dropout, so that it is the same whenever a step is taken; a seed of its own for each step and rank."""
    of_step = int(np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1)[0])
    torch.manual_seed(of_step)
    return of_step


@dataclass
class Loop:
    """A run under way.

    Args:
        folder: the run's.
        run, optim: how long, and how.
        engine: the model and its optimizer.
        loader: the batches.
        metrics: where numbers go.
        total: optimizer steps in all.
        backward: of a step's number and batch, on every rank alike: makes the gradients, and returns the losses
            by name, their sum as "loss".
        evaluate: on every rank alike: numbers by name, the first of which, in [0, 1], the progress bar shows.
    """

    folder: Path
    run: RunConfig
    optim: OptimConfig
    engine: Engine
    loader: TrainLoader
    metrics: Metrics
    total: int
    backward: Callable[[int, Any], dict[str, Tensor]]
    evaluate: Callable[[], dict[str, float]]
    _at: tuple[int, list[str]] = (0, [])  # the step under way and the records of its batch on this rank

    def __call__(self, first: int) -> None:
        """Steps `first` to the last.

        Raises:
            FloatingPointError: a loss or the gradient stopped being finite; the message says where.
        """
        try:
            if first == 0:
                self._save(0)
            self._run(first)
        except FloatingPointError as error:
            step, records = self._at
            raise FloatingPointError(
                f"step {step}: {error}; the run stops and saves nothing more. Look at --lr (now {self.optim.lr}), "
                f"--warmup, --grad-clip, and at the records {', '.join(records[:3])}..."
            ) from None

    def _run(self, first: int) -> None:
        run, began, seen = self.run, time.perf_counter(), 0
        eval_every = run.eval_every or max(1, self.total // 10)
        save_every = run.save_every or self.loader.steps_per_epoch
        batches = iter(self.loader)
        accuracy: dict[str, float] = {}
        for step in range(first, self.total):
            batch, done = next(batches), step + 1
            self._at = done, batch.ids
            values = self._step(step, batch)
            seen += len(batch.ids) * dist.get_world_size()
            rate = seen / (time.perf_counter() - began)
            last, new = done == self.total, {}
            if last or done % eval_every == 0:
                new = self.evaluate()
                accuracy = new or accuracy
            note = f"loss {values['loss']:.3f}  {rate:.0f} samples/s  {peak_memory()}  {_shown(accuracy)}"
            self.metrics.advance(done, note)
            if last or new or done % run.log_every == 0:
                measured = {f"eval/{k}": v for k, v in new.items()}
                record = {**values, "samples_per_s": round(rate, 1), "epoch": batch.epoch, **measured}
                self.metrics.log(done, record, note=note)
                began, seen = time.perf_counter(), 0
            if last or done % save_every == 0:
                self._save(done)
                began, seen = time.perf_counter(), 0

    def _step(self, step: int, batch: Any) -> dict[str, float]:
        losses = {name: x.item() for name, x in self.backward(step, batch).items()}
        for name, value in losses.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value}")
        lr = cosine_lr(step, self.optim, self.total)
        return {**losses, "grad_norm": self.engine.step(lr), "lr": lr}

    def _save(self, step: int) -> None:
        state = {"epoch": step // self.loader.steps_per_epoch, "total": self.total}
        root = self.folder / "checkpoints"
        save_state(self.engine, root, step, state, self.loader.state_dict(), keep=self.run.keep)


def _shown(accuracy: dict[str, float]) -> str:
    return "  ".join(f"{k} {100 * v:.1f} %" for k, v in list(accuracy.items())[:1])
