"""Trains BLIP-2's first stage: the recipe."""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.data import Batch, PairData, open_data
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece, train_wordpiece
from mmcore.parts.towers import Tower, load_tower
from mmcore.runs import BLIP2_STAGE1, FROZEN, blip2_shape
from mmcore.systems.blip2.model import BLIP2, BLIP2Config
from mmcore.systems.blip2.retrieval import evaluate_blip2, load_run, report
from mmcore.systems.blip2.shapes import blip2_config
from mmcore.systems.blip2.steps import stage1_backward
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.loop import on_rank_zero, seed_step
from mmcore.train.optim import OptimConfig, blip2_optim
from mmcore.train.recipe import Recipe, run_recipe, write_folder
from mmcore.train.run import Start, open_run


@dataclass(frozen=True)
class Blip2Stage1Config(Recipe):
    """Train BLIP-2's Q-Former (arXiv 2301.12597, stage 1) on image-caption pairs: contrast, matching, captions."""

    optim: OptimConfig = field(default_factory=partial(blip2_optim, 5000))
    model: str = "tiny"
    """tiny, small (for the towers of a CLIP of that name) or ViT-g (as published)."""
    vision: Path | None = None
    """The image tower: a run of mmcore train clip, or a CLIP or BLIP-2 of transformers or open_clip."""
    freeze_vision: bool = True
    """Keep the image tower as it is, as published."""
    tokenizer: Path | None = None
    """BERT's vocab.txt, or a folder with it; None = one is learned from the captions."""
    max_text: int = 32
    """Tokens of a caption, [CLS] and [SEP] included."""


def _make_tokenizer(config: Blip2Stage1Config, start: Start, data: PairData) -> WordPiece:
    if start.checkpoint is not None:
        return load_wordpiece(start.folder / "tokenizer")
    if config.tokenizer is not None:
        return load_wordpiece(config.tokenizer)
    return train_wordpiece(list(data.captions()), vocab_size=blip2_config(config.model).qformer.vocab_size)


def _prepare_folder(config: Blip2Stage1Config, data: PairData, world_size: int) -> Start:
    """On rank 0: checks everything that a user can get wrong, and only then writes the run's folder."""
    if config.run.accum != 1:
        raise ValueError(
            f"--accum must be 1 with {BLIP2_STAGE1}, got {config.run.accum}: give each rank a larger batch"
        )
    start = open_run(BLIP2_STAGE1, config.run)
    wordpiece = _make_tokenizer(config, start, data)
    tower = None if start.checkpoint is not None else _make_tower(config)
    if start.checkpoint is not None:
        model_config = _saved_shape(start)
    else:
        model_config = blip2_config(
            config.model,
            vision=None if tower is None else tower.config,
            vocab_size=wordpiece.vocab_size,
            pad_token_id=wordpiece.pad_token_id,
            decoder_token_id=wordpiece.decoder_token_id,
        )
    most = model_config.qformer.max_text
    if not 2 <= config.max_text <= most:
        raise ValueError(f"--max-text must be from 2 to {most}, got {config.max_text}")
    data.train_loader(config.loader_spec(model_config.vision.image_size, 0, world_size), None)

    def save(folder: Path) -> dict[str, Any]:
        if not (folder / "tokenizer").exists():
            wordpiece.save(folder / "tokenizer")
        if tower is not None and config.freeze_vision:
            frozen = {f"visual.{name}": x.contiguous() for name, x in tower.state.items()}
            save_file(frozen, folder / FROZEN)
        return asdict(model_config)

    return write_folder(BLIP2_STAGE1, config, start, world_size, save)


def _make_tower(config: Blip2Stage1Config) -> Tower | None:
    if config.vision is not None:
        return load_tower(config.vision)
    if config.freeze_vision:
        raise ValueError(
            "--vision must be given, or --no-freeze-vision: a frozen image tower of random weights shows nothing"
        )
    return None


def _saved_shape(start: Start) -> BLIP2Config:
    return blip2_shape(json.loads((start.folder / "config.json").read_text())["model"])


def _make_model(config: Blip2Stage1Config, start: Start) -> BLIP2:
    torch.manual_seed(config.run.seed)
    model = BLIP2(_saved_shape(start), freeze_vision=config.freeze_vision)
    state: dict[str, Tensor] = {}
    if config.freeze_vision:
        state = load_file(start.folder / FROZEN)
    elif config.vision is not None and start.checkpoint is None:
        state = {f"visual.{name}": x for name, x in load_tower(config.vision).state.items()}
    if start.checkpoint is not None:
        state |= dict(checkpoint.tensors(start.checkpoint, "weight"))
    model.load_trained(model.state_dict() | state)
    return model


def train_blip2_stage1(config: Blip2Stage1Config) -> Path:
    """Trains as `config` says, on every rank alike; returns the run's folder.

    Raises:
        ValueError: something in the configuration, the data or the run's folder is wrong.
        FloatingPointError: a loss or the gradient stopped being finite.
    """
    rank, world_size = init_distributed()
    data = open_data(config.data, seed=config.run.seed)
    start: Start = on_rank_zero(lambda: _prepare_folder(config, data, world_size))
    wordpiece = load_wordpiece(start.folder / "tokenizer")
    model = _make_model(config, start)
    image_size = model.config.vision.image_size
    loader = data.train_loader(config.loader_spec(image_size, rank, world_size), None)

    def evaluate(engine: Engine) -> dict[str, float]:
        if data.val is None:
            return {}
        sizes = {"image_size": image_size, "max_text": config.max_text}
        return evaluate_blip2(engine, wordpiece, data.val, **sizes, device=engine.device)

    def backward(engine: Engine, step: int, batch: Batch) -> dict[str, Tensor]:
        seed = seed_step(config.run.seed, step)
        texts = wordpiece.padded(batch.captions, config.max_text)
        return stage1_backward(
            engine,
            batch.images.to(engine.device),
            type(texts)(*(x.to(engine.device) for x in texts)),
            image_ids=batch.image_ids.to(engine.device),
            text_ids=batch.labels.to(engine.device),
            generator=torch.Generator().manual_seed(seed),
        )

    what = f"{config.model}'s Q-Former"
    records = run_recipe(config, start, what, model, data, loader, backward=backward, evaluate=evaluate)
    if rank == 0:
        report(load_run(start.folder), records)
    return start.folder
