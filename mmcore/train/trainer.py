"""The one trainer: any recipe from its settings to a finished run, resumed where it stopped."""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.data import StepBatch, TrainLoader
from mmcore.figures import shown
from mmcore.recipe import Recipe, Step
from mmcore.runs import FROZEN, load_weights, read_assets
from mmcore.settings import as_yaml, check_resumed, to_json
from mmcore.tasks import Subject, follow, report
from mmcore.tasks.ranks import Ranks
from mmcore.train import state
from mmcore.train.deepspeed_json import auto_precision, deepspeed_config
from mmcore.train.engine import Engine, check_config, init_distributed, partitioner
from mmcore.train.optim import lr_schedule, make_optimizer, param_groups, warmup_steps, weight_decay_schedule
from mmcore.train.run import Metrics, Start, open_run, peak_memory

T = TypeVar("T")
At = tuple[int, list[str]]
"""A step, counted from 1, and its records on this rank."""
MIN_STEPS = 50
"""Steps before a run can be said to have collapsed: the running statistics of BatchNorm forget where they began."""
MAX_UNREAD = 100
"""Steps after which the losses are read, to see whether they are finite, however seldom they are logged."""


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


def train(name: str, recipe: Recipe, *, is_quiet: bool = False) -> Path:
    """Trains as a recipe says, on every rank alike; returns the run's folder. `is_quiet` leaves out the last report.

    Raises:
        ValueError: something in the settings, the data or the run's folder is wrong.
        FloatingPointError: a loss or the gradient stopped being finite, or the model has collapsed.
    """
    rank, world_size = init_distributed()
    data = recipe.open_data()
    start = on_rank_zero(lambda: _prepare(name, recipe, data, world_size))
    saved = json.loads((start.folder / "config.json").read_text())
    assets = read_assets(recipe, start.folder, saved)
    recipe.prepare(data, assets, rank, world_size)
    loader = recipe.loader(data, assets, recipe.spec(rank, world_size))
    model = _model(recipe, assets, start)
    engine = _engine(recipe, start, model, world_size)
    loader.device = engine.device if engine.device.type == "cuda" else None
    companions = recipe.companions(engine)
    first = 0
    if start.checkpoint is not None:
        state.restore_companions(companions, start.checkpoint)
        loader.load_state_dict(state.read_loader(start.checkpoint))
        first = state.read_state(start.checkpoint)["step"]
    total = recipe.run.steps or recipe.run.epochs * loader.steps_per_epoch

    def measured() -> dict[str, float]:
        with engine.eval():  # a subject keeps what its model made of the held-out pairs
            ranks = Ranks(rank, world_size)
            return follow(Subject(recipe, assets, engine, data, engine.device, ranks=ranks))

    options = {"tensorboard": recipe.run.tensorboard, "active": rank == 0}
    with Metrics(start.folder, total, first, **options) as metrics:
        for part, what in saved.get("summary", {}).items():
            metrics.say(f"{part:<16}{what}")
        num_parameters = sum(engine.shards.numel(name) for name in engine.params)
        if recipe.run.resume is not None and start.checkpoint is None:
            metrics.say(f"{start.folder} has no checkpoint yet: training begins at the first step")
        metrics.say(
            f"training {name} ({num_parameters / 1e6:.1f} M parameters) on {data.name}: {data.num_train} samples, "
            f"{total - first} steps of {loader.spec.global_batch}, ZeRO {engine.stage}, {engine.precision}, "
            f"{world_size} rank{'s' * (world_size > 1)}"
        )
        if recipe.engine.precision == "auto":
            metrics.say(f"--precision auto is {engine.precision}: {auto_precision()[1]}")
        for line in recipe.shown(data, assets) if rank == 0 else ():
            metrics.say(line)
        Loop(start.folder, recipe, engine, loader, metrics, total, companions, measured)(first)
    engine.close()
    if rank == 0 and not is_quiet:
        report(start.folder, metrics.records)
    return start.folder


def _prepare(name: str, recipe: Recipe, data: Any, world_size: int) -> Start:
    """On rank 0: checks everything that a user can get wrong, and only then writes the run's folder."""
    if recipe.run.accum != 1 and not recipe.accumulates:
        raise ValueError(f"--accum must be 1 with {name}, got {recipe.run.accum}: give each rank a larger batch")
    start = open_run(name, recipe.run)
    config, _ = deepspeed_config(recipe.engine, recipe.optim, batch_size=recipe.per_rank, world_size=world_size)
    check_config(config)
    stage, stages = config["zero_optimization"]["stage"], recipe.stages
    if stage not in stages:
        what = f"--zero must be from {stages[0]} to {stages[-1]} with {name}, got {stage}"
        raise ValueError(f"{what}: its momentum teacher follows whole weights, which stage 3 cuts up")
    if start.checkpoint is not None:
        saved = json.loads((start.folder / "config.json").read_text())
        check_resumed(saved["settings"], recipe)
        before, now = saved["settings"]["global batch"], recipe.per_rank * world_size
        if before != now:
            flags = "--batch-size times --accum times the ranks"
            raise ValueError(f"{flags} must be {before} as in the run that is resumed, got {now}")
        recipe.loader(data, read_assets(recipe, start.folder, saved, "use"), recipe.spec(0, world_size))
        return start
    assets = recipe.assets(data)
    recipe.loader(data, assets, recipe.spec(0, world_size))
    start.folder.mkdir(parents=True, exist_ok=recipe.run.resume is not None)
    settings = {**to_json(recipe), "global batch": recipe.per_rank * world_size}
    saved = {"recipe": name, "settings": settings, "model": _install(assets, start.folder), "summary": assets.summary}
    checkpoint.write_file(start.folder / "settings.yaml", as_yaml(recipe).encode())
    checkpoint.write_json(start.folder / "config.json", saved)
    return start


def _install(assets: Any, folder: Path) -> dict[str, Any]:
    """Writes assets into a run's folder, in place of what a run that was killed before its first checkpoint left."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".assets-") as temporary:
        staged = Path(temporary)
        shape = assets.save(staged)
        if assets.frozen:
            save_file({name: x.contiguous() for name, x in assets.frozen.items()}, staged / FROZEN)
        for path in staged.iterdir():
            checkpoint.replace_path(path, folder / path.name)
    return shape


def _model(recipe: Recipe, assets: Any, start: Start) -> nn.Module:
    """As it is at the first step to come."""
    torch.manual_seed(recipe.run.seed)
    sizes = {"batch_size": recipe.per_rank, "world_size": dist.get_world_size()}
    config, _ = deepspeed_config(recipe.engine, recipe.optim, **sizes)
    model = recipe.build(replace(assets, partition=partitioner(config)))
    if start.checkpoint is None:
        load_weights(model, recipe.initial(assets, model), is_whole=False)
    else:
        load_weights(model, checkpoint.stored(start.checkpoint, "weight"))
        state.restore_module(model, state.BUFFERS, start.checkpoint)
    return model


def _engine(recipe: Recipe, start: Start, model: nn.Module, world_size: int) -> Engine:
    groups = param_groups(model, recipe.optim, recipe.rules)
    optimizer = make_optimizer(groups, recipe.optim)
    sizes = {"batch_size": recipe.per_rank, "world_size": world_size}
    resolved, precision = deepspeed_config(recipe.engine, recipe.optim, **sizes)
    if dist.get_rank() == 0:
        checkpoint.write_json(start.folder / "deepspeed.json", resolved)
    engine = Engine(model, optimizer, resolved, precision)
    if start.checkpoint is not None:
        state.restore_engine(engine, start.checkpoint)
    return engine


class Collapsed(FloatingPointError):
    """What a model makes of images is the same for all."""


@dataclass
class Loop:
    """A run under way: steps, logs, evaluations and checkpoints."""

    folder: Path
    recipe: Recipe
    engine: Engine
    loader: TrainLoader
    metrics: Metrics
    total: int  # optimizer steps in all
    companions: Any  # see `Recipe.companions`
    # on every rank alike: numbers by name, the first of which the progress bar shows
    evaluate: Callable[[], dict[str, float]]
    _at: At = field(default=(0, []), init=False)
    _unread: list[tuple[At, dict[str, Tensor | float]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._lr = lr_schedule(self.recipe.optim, self.total)
        self._warmup = warmup_steps(self.recipe.optim, self.total)
        self._weight_decay = weight_decay_schedule(self.recipe.optim, self.total)

    def __call__(self, first: int) -> None:
        """Steps `first` to the last; a FloatingPointError says where a loss or the gradient stopped being finite, or
        what shows that the model has collapsed."""
        try:
            self._run(first)
        except FloatingPointError as error:
            step, records = self._at
            look = f"--grad-clip, and at the records {', '.join(records[:3])}..."
            if isinstance(error, Collapsed):
                look = "--batch-size, and at what keeps images apart: negatives, a stop-gradient, a teacher's momentum"
            said = f"step {step}: {error}; the run stops and saves nothing more"
            raise type(error)(f"{said}. Look at --lr (now {self.recipe.optim.lr}), --warmup, {look}") from None

    def _run(self, first: int) -> None:
        run, began, seen = self.recipe.run, time.perf_counter(), 0
        eval_every = run.eval_every or max(1, self.total // 10)
        save_every = run.save_every or self.loader.steps_per_epoch
        accuracy: dict[str, float] = {}
        for number in range(first, self.total):
            batch: StepBatch = next(self.loader)
            done = number + 1
            self._at = done, batch.ids
            try:
                self._unread.append((self._at, self._step(number, batch)))
            except ValueError:  # of weights that are not finite since a step before, which is to be said
                self._read()
                raise
            seen += len(batch.ids) * dist.get_world_size()
            logs, measures, saves = (
                done == self.total or done % n == 0 for n in (run.log_every, eval_every, save_every)
            )
            if not (logs or measures or saves or len(self._unread) == MAX_UNREAD):
                self.metrics.advance(done)
                continue
            values = self._read()
            rate, new = seen / (time.perf_counter() - began), self.evaluate() if measures else {}
            accuracy = new or accuracy
            memory = peak_memory(self.engine.device)
            note = f"loss {values['loss']:.3f}  {rate:.0f} samples/s  {memory}  {_shown(accuracy)}"
            self.metrics.advance(done, note)
            if logs or new:
                measured = {f"eval/{k}": v for k, v in new.items()}
                values["lr"] = self._lr(number)
                record = {**values, "samples_per_s": round(rate, 1), "epoch": batch.epoch, **measured}
                self.metrics.log(done, record, note=note)
                began, seen = time.perf_counter(), 0
            self._check(new, done)
            if saves:
                self._save(done)
                began, seen = time.perf_counter(), 0

    def _step(self, number: int, batch: StepBatch) -> dict[str, Tensor | float]:
        """Losses and the gradient's norm, which are not read here: a GPU would be waited for."""
        step = Step(number, self.total, seed_step(self.recipe.run.seed, number), self.companions)
        losses = self.recipe.backward(self.engine, batch.parts, step)
        norm = self.engine.step(self._lr(number), weight_decay=self._weight_decay(number), step=number)
        self.recipe.after_step(self.engine, step)
        return {**losses, "gradient norm": norm}

    def _check(self, measured: dict[str, float], done: int) -> None:
        """Raises Collapsed where a figure is below what the recipe says is the least, after the warm-up."""
        least = self.recipe.least if done > max(self._warmup, MIN_STEPS) else {}
        for name in least.keys() & measured.keys():
            if measured[name] < least[name]:
                found = f"{measured[name]:.3f}, below {least[name]:g}"
                raise Collapsed(f"the {name} (held-out) is {found}: of all images nearly the same is made")

    def _read(self) -> dict[str, float]:
        """The latest step's numbers; the device is waited for once for all steps that were not read yet. Raises
        FloatingPointError for the first that is not finite."""
        if not self._unread:
            return {}
        device = next(x.device for x in self._unread[0][1].values() if isinstance(x, Tensor))
        unread = [torch.as_tensor(x, dtype=torch.float64, device=device) for _, of in self._unread for x in of.values()]
        numbers, values = iter(torch.stack(unread).tolist()), {}
        for at, names in self._unread:
            values = {name: next(numbers) for name in names}
            for name, value in values.items():
                if not math.isfinite(value):
                    self._at = at
                    raise FloatingPointError(f"the {name} is {value}")
        self._unread.clear()
        values["grad_norm"] = values.pop("gradient norm")
        return values

    def _save(self, step: int) -> None:
        done = {"epoch": step // self.loader.steps_per_epoch, "total": self.total}
        options = {"keep": self.recipe.run.keep, "companions": self.companions}
        state.save_state(self.engine, self.folder / "checkpoints", step, done, self.loader.state_dict(), **options)


def _shown(accuracy: dict[str, float]) -> str:
    return "  ".join(f"{k} {shown(k, v)}" for k, v in list(accuracy.items())[:1])
