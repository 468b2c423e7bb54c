"""Trains CLIP: the recipe, and the loop that reads like one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore import checkpoint
from mmcore.data import Batch, PairData, open_data
from mmcore.data.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mmcore.systems.clip.evaluate import evaluate_clip, load_run, report
from mmcore.systems.clip.model import CLIP, CLIPConfig, caption_lengths
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.clip.weights import load_clip
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.gradcache import contrastive_backward
from mmcore.train.loop import on_rank_zero
from mmcore.train.recipe import Recipe, run_recipe, write_folder
from mmcore.train.run import Start, open_run


@dataclass(frozen=True)
class ClipConfig(Recipe):
    """Train CLIP (arXiv 2103.00020) on image-caption pairs, under DeepSpeed, on any number of ranks."""

    model: str = "tiny"
    """tiny, small, ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336; with -quickgelu for OpenAI's weights."""
    tokenizer: Path | None = None
    """CLIP's BPE files (a folder with vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab_16e6.txt.gz);
    None = one is trained on the captions."""
    init: Path | None = None
    """Weights to start from: a file or folder of transformers or open_clip (safetensors, or .pt read weights-only)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""


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
    image_size = clip_config(config.model).vision.image_size
    data.train_loader(config.loader_spec(image_size, 0, world_size), tokenizer)
    if start.checkpoint is None and config.init is not None:
        _make_model(config, start, tokenizer)

    def save(folder: Path) -> dict[str, Any]:
        if not (folder / "tokenizer").exists():
            tokenizer.save(folder / "tokenizer")
        return asdict(_model_config(config, tokenizer))

    return write_folder("clip", config, start, world_size, save)


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


def _backward(engine: Engine, batch: Batch, eos_token_id: int | None, accum: int) -> dict[str, Tensor]:
    lengths = caption_lengths(batch.tokens, eos_token_id)  # while they are on the host
    images, tokens = batch.images.to(engine.device), batch.tokens.to(engine.device)
    return {"loss": contrastive_backward(engine, images, tokens, lengths, accum)}


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
    image_size = model.config.vision.image_size
    loader = data.train_loader(config.loader_spec(image_size, rank, world_size), tokenizer)

    def evaluate(engine: Engine) -> dict[str, float]:
        if data.val is None:
            return {}
        return evaluate_clip(engine, tokenizer, data, image_size=image_size, device=engine.device)

    def backward(engine: Engine, _: int, batch: Batch) -> dict[str, Tensor]:
        return _backward(engine, batch, model.config.text.eos_token_id, config.run.accum)

    records = run_recipe(
        config, start, config.model, model, data, loader, backward=backward, evaluate=evaluate
    )
    if rank == 0:
        report(load_run(start.folder), records)
    return start.folder
