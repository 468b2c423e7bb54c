"""Trains CLIP: the recipe, and the loop that reads like one."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmcore import checkpoint
from mmcore.data import Batch, DataConfig, LoaderSpec, PairData, TrainLoader, open_data
from mmcore.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mmcore.eval.clip import evaluate_clip, load_run, report
from mmcore.models.clip import CLIP, CLIPConfig
from mmcore.models.clip_configs import clip_config
from mmcore.models.clip_weights import load_clip
from mmcore.train.engine import Engine, EngineConfig, Precision, deepspeed_config, init_distributed
from mmcore.train.gradcache import contrastive_backward
from mmcore.train.optim import OptimConfig, clip_param_groups, cosine_lr, make_optimizer
from mmcore.train.run import Metrics, RunConfig, Start, check_settings, open_run, peak_memory
from mmcore.train.state import read_loader, read_state, restore_engine, save_state

T = TypeVar("T")

TOKENIZER_CAPTIONS = 200_000
"""Captions that a tokenizer of our own is trained on, at most."""


@dataclass(frozen=True)
class ClipConfig:
    """Train CLIP (arXiv 2103.00020) on image-caption pairs, under DeepSpeed, on any number of ranks."""

    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: str = "tiny"
    """tiny, small, ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336; with -quickgelu for OpenAI's weights."""
    tokenizer: Path | None = None
    """CLIP's BPE files (a folder with vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab_16e6.txt.gz);
    None = one is trained on the captions."""
    init: Path | None = None
    """Weights to start from: a file or folder of transformers or open_clip (safetensors, or .pt read weights-only)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""


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


def _settings(config: ClipConfig, world_size: int) -> dict[str, Any]:
    settings = json.loads(json.dumps(asdict(config), default=str))
    settings["global batch"] = config.run.batch_size * config.run.accum * world_size
    return settings


def _make_tokenizer(config: ClipConfig, start: Start, data: PairData) -> Tokenizer:
    if start.checkpoint is not None:
        return load_tokenizer(start.folder / "tokenizer")
    shape = clip_config(config.model).text
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, context_length=shape.context_length)
    return train_tokenizer(
        list(data.captions()), vocab_size=shape.vocab_size, context_length=shape.context_length
    )


def _prepare_folder(config: ClipConfig, data: PairData, world_size: int) -> Start:
    """On rank 0: checks everything that a user can get wrong, and only then writes the run's folder."""
    start = open_run("clip", config.run)
    tokenizer = _make_tokenizer(config, start, data)
    spec = _loader_spec(config, clip_config(config.model).vision.image_size, 0, world_size)
    data.train_loader(spec, tokenizer)
    model_config = _model_config(config, tokenizer)
    if start.checkpoint is None and config.init is not None:
        _make_model(config, start, tokenizer)
    _resolve(config, world_size)
    settings = _settings(config, world_size)
    if start.checkpoint is not None:
        check_settings(json.loads((start.folder / "config.json").read_text())["settings"], settings)
        return start
    start.folder.mkdir(parents=True, exist_ok=config.run.resume is not None)
    if not (start.folder / "tokenizer").exists():
        tokenizer.save(start.folder / "tokenizer")
    saved = {"recipe": "clip", "settings": settings, "model": asdict(model_config)}
    checkpoint.write_json(start.folder / "config.json", saved)
    return start


def _loader_spec(config: ClipConfig, image_size: int, rank: int, world_size: int) -> LoaderSpec:
    run = config.run
    return LoaderSpec(
        image_size=image_size,
        batch_size=run.batch_size * run.accum,
        rank=rank,
        world_size=world_size,
        seed=run.seed,
        workers=config.data.workers,
    )


def _model_config(config: ClipConfig, tokenizer: Tokenizer) -> CLIPConfig:
    return clip_config(
        config.model,
        vocab_size=tokenizer.vocab_size,
        context_length=tokenizer.context_length,
        eos_token_id=tokenizer.eos_token_id,
    )


def _make_model(config: ClipConfig, start: Start, tokenizer: Tokenizer) -> CLIP:
    torch.manual_seed(config.run.seed)
    model = CLIP(_model_config(config, tokenizer))
    if start.checkpoint is not None:
        model.load_state_dict(dict(checkpoint.tensors(start.checkpoint, "weight")))
    elif config.init is not None:
        loaded = load_clip(config.init, image_size=model.config.vision.image_size)
        model.load_state_dict(loaded.state_dict())
    model.set_activation_checkpointing(config.activation_checkpointing)
    return model


def _resolve(config: ClipConfig, world_size: int) -> tuple[dict[str, Any], Precision]:
    per_rank = config.run.batch_size * config.run.accum
    return deepspeed_config(config.engine, config.optim, batch_size=per_rank, world_size=world_size)


def _make_engine(config: ClipConfig, start: Start, model: CLIP, world_size: int) -> Engine:
    optimizer = make_optimizer(clip_param_groups(model, config.optim.weight_decay), config.optim)
    resolved, precision = _resolve(config, world_size)
    if dist.get_rank() == 0:
        checkpoint.write_json(start.folder / "deepspeed.json", resolved)
    engine = Engine(model, optimizer, resolved, precision)
    if start.checkpoint is not None:
        restore_engine(engine, start.checkpoint)
    return engine


@dataclass
class _Run:
    """What the loop holds."""

    config: ClipConfig
    folder: Path
    engine: Engine
    data: PairData
    loader: TrainLoader
    tokenizer: Tokenizer
    metrics: Metrics
    total: int
    at: tuple[int, list[str]] = (0, [])
    """The step under way and the records of its batch on this rank, for the message where it fails."""

    def train_step(self, step: int, batch: Batch) -> dict[str, float]:
        engine, optim = self.engine, self.config.optim
        warmup = min(optim.warmup, max(1, self.total // 10))
        lr = cosine_lr(step, peak=optim.lr, warmup=warmup, total=self.total)
        longest = int(batch.tokens.any(dim=0).nonzero().max()) + 1  # what follows is padding in every caption
        images, tokens = batch.images.to(engine.device), batch.tokens[:, :longest].to(engine.device)
        loss = contrastive_backward(engine, images, tokens, self.config.run.accum).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return {"loss": loss, "grad_norm": engine.step(lr), "lr": lr}

    def save(self, step: int) -> Path:
        state = {"epoch": step // self.loader.steps_per_epoch, "total": self.total}
        root = self.folder / "checkpoints"
        return save_state(self.engine, root, step, state, self.loader.state_dict(), keep=self.config.run.keep)

    def evaluate(self) -> dict[str, float]:
        if self.data.val is None:
            return {}
        with self.engine.eval():
            size = self.loader.spec.image_size
            return evaluate_clip(
                self.engine, self.tokenizer, self.data, image_size=size, device=self.engine.device
            )


def _loop(run: _Run, first: int) -> None:
    """Steps `first` to the last, with logs, evaluations and checkpoints on the way."""
    options, began, seen = run.config.run, time.perf_counter(), 0
    eval_every = options.eval_every or max(1, run.total // 10)
    save_every = options.save_every or run.loader.steps_per_epoch
    batches = iter(run.loader)
    accuracy: dict[str, float] = {}
    for step in range(first, run.total):
        batch = next(batches)
        run.at, done = (step + 1, batch.ids), step + 1
        values = run.train_step(step, batch)
        seen += len(batch.ids) * dist.get_world_size()
        rate = seen / (time.perf_counter() - began)
        last, new = done == run.total, {}
        if last or done % eval_every == 0:
            new = run.evaluate()
            accuracy = new or accuracy
        note = f"loss {values['loss']:.3f}  {rate:.0f} samples/s  {peak_memory()}  {_shown(accuracy)}"
        run.metrics.advance(done, note)
        if last or new or done % options.log_every == 0:
            measured = {f"eval/{k}": v for k, v in new.items()}
            record = {**values, "samples_per_s": round(rate, 1), "epoch": batch.epoch, **measured}
            run.metrics.log(done, record, note=note)
            began, seen = time.perf_counter(), 0
        if last or done % save_every == 0:
            run.save(done)
            began, seen = time.perf_counter(), 0


def _shown(accuracy: dict[str, float]) -> str:
    return "  ".join(f"{k} {100 * v:.1f} %" for k, v in list(accuracy.items())[:1])


def train_clip(config: ClipConfig) -> Path:
    """Trains as `config` says, on every rank alike; returns the run's folder.

    Raises:
        ValueError: something in the configuration, the data or the run's folder is wrong.
        FloatingPointError: the loss or the gradient stopped being finite.
    """
    rank, world_size = init_distributed()
    data = open_data(config.data, seed=config.run.seed)
    start: Start = on_rank_zero(lambda: _prepare_folder(config, data, world_size))
    tokenizer = load_tokenizer(start.folder / "tokenizer")
    model = _make_model(config, start, tokenizer)
    loader = data.train_loader(
        _loader_spec(config, model.config.vision.image_size, rank, world_size), tokenizer
    )
    first = 0
    if start.checkpoint is not None:
        first = read_state(start.checkpoint)["step"]
        loader.load_state_dict(read_loader(start.checkpoint))
    total = config.run.steps or config.run.epochs * loader.steps_per_epoch
    engine = _make_engine(config, start, model, world_size)
    options = {"tensorboard": config.run.tensorboard, "active": rank == 0}
    with Metrics(start.folder, total, first, **options) as metrics:
        run = _Run(config, start.folder, engine, data, loader, tokenizer, metrics, total)
        metrics.say(
            f"training {config.model} ({sum(engine.shards.numel(n) for n in engine.params) / 1e6:.1f} M parameters) on "
            f"{data.name}: {data.num_train} pairs, {total - first} steps of {loader.spec.global_batch} pairs, "
            f"ZeRO {engine.stage}, {engine.precision}, {world_size} rank{'s' * (world_size > 1)}"
        )
        try:
            if first == 0:
                run.save(0)
            _loop(run, first)
        except FloatingPointError as error:
            step, records = run.at
            raise FloatingPointError(
                f"step {step}: {error}; the run stops and saves nothing more. Look at --lr (now {config.optim.lr}), "
                f"--warmup, --grad-clip, and at the records {', '.join(records[:3])}..."
            ) from None
    if rank == 0:
        report(load_run(start.folder), metrics.records)
    engine.close()
    return start.folder
