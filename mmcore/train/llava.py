"""Trains LLaVA, both stages: the recipes."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.data.chat_loader import ChatPart, ChatTrainBatch, chat_loader
from mmcore.data.chats import ChatConfig, ChatData, open_chats
from mmcore.data.conversations import IMAGE
from mmcore.data.loader import MapLoader
from mmcore.data.templates import ChatTokens
from mmcore.eval.chat import accuracy, replies
from mmcore.eval.llava import load_run, report
from mmcore.integrations.transformers import NAME as ATTENTION
from mmcore.integrations.transformers import register
from mmcore.losses import global_ratio
from mmcore.models.blip2 import IGNORED
from mmcore.models.language import load_language_model, load_language_tokenizer
from mmcore.models.language_folder import LANGUAGE_MODEL, language_model_folder
from mmcore.models.llava import Llava, LlavaConfig, Lora, Trainable, learned_labels
from mmcore.models.llava_runs import LORA, llava_of, llava_shape, load_trained, read_llava
from mmcore.models.runs import FROZEN, LLAVA_STAGE1, find_run
from mmcore.models.towers import load_tower
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.language import TINY, Language, check_llm_steps, read_language, tiny_language
from mmcore.train.loop import on_rank_zero, seed_step
from mmcore.train.optim import OptimConfig
from mmcore.train.recipe import Recipe, run_recipe, write_folder
from mmcore.train.run import Start, open_run
from mmcore.train.tiny_lm import Said

# how the names of a model's parts begin
_VISION, _PROJECTOR, _NEWLINE, _LANGUAGE = "visual.", "projector.", "image_newline", "language_model."
# Conversations that a run is measured on while it trains.
MAX_EVALUATED = 96


def _published(lr: float) -> OptimConfig:
    decays = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return OptimConfig(lr=lr, warmup=10**9, warmup_share=0.03, **decays)


@dataclass(frozen=True)
class LlavaRecipe(Recipe):
    """What both stages have in common."""

    data: ChatConfig = field(default_factory=ChatConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    max_length: int = 2048
    """Tokens of a row, those of images included."""
    pack: bool = True
    """Several conversations stand in a row and see nothing of each other; else each has a row of its own."""
    llm: str | None = None
    """The language model: a folder of transformers (Llama, Qwen, Vicuna; safetensors), or 'tiny', one that is trained
    from nothing on the texts of --data first; None = that of --from, or of the run that is resumed."""
    llm_steps: int | None = None
    """Steps that --llm tiny is trained for first; None = 400."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time; as published."""
    max_answer: int = 64
    """Tokens of an answer at most when the run is measured."""

    def __post_init__(self) -> None:
        if self.max_answer < 1:
            raise ValueError(f"--max-answer must be at least 1, got {self.max_answer}")

    @property
    def trainable(self) -> Trainable:
        return "projector"

    @property
    def adapters(self) -> Lora | None:
        return None

    @property
    def learned(self) -> tuple[str, ...]:
        """How the names of the weights begin that learn, adapters aside."""
        parts = [_PROJECTOR, _NEWLINE]
        if self.trainable != "projector" and self.adapters is None:
            parts.append(_LANGUAGE)
        return (*parts, _VISION) if self.trainable == "all" else tuple(parts)


@dataclass(frozen=True)
class LlavaStage1Config(LlavaRecipe):
    """Train LLaVA's projector between a frozen image tower and a frozen language model (arXiv 2310.03744, stage 1)."""

    optim: OptimConfig = field(default_factory=partial(_published, 1e-3))
    vision: Path | None = None
    """The image tower: a run of mmcore train clip, or a CLIP or BLIP-2 of transformers or open_clip."""
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """linear = LLaVA's (arXiv 2304.08485), mlp2x_gelu = that of 1.5 and NeXT."""
    anyres: bool = False
    """Cut large images into tiles, as NeXT does."""
    template: str = "plain"
    """plain = the caption behind the image; v1, llama_3, chatml, or auto, the tokenizer's own."""


@dataclass(frozen=True)
class LlavaStage2Config(LlavaRecipe):
    """Train LLaVA's projector and language model on conversations (arXiv 2310.03744, stage 2)."""

    optim: OptimConfig = field(default_factory=partial(_published, 2e-5))
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A run of mmcore train llava-stage1 or llava-stage2. A resumed run needs none."""
    template: str = "v1"
    """v1 (Vicuna), llama_3, chatml, or auto, the tokenizer's own."""
    train_vision: bool = False
    """Train the image tower too, as NeXT does."""
    vision_lr: float | None = None
    """Learning rate of the image tower, with --train-vision; NeXT's 2e-6 beside --lr 1e-5. None = --lr."""
    projector_lr: float | None = None
    """Learning rate of the projector; None = --lr."""
    lora: int | None = None
    """Train adapters of this rank (peft) in place of the language model's weights; published with 128, --lr 2e-4 and
    --projector-lr 2e-5. None = train the weights."""
    lora_alpha: int | None = None
    """The adapters count alpha / rank times; None = twice the rank."""
    lora_dropout: float = 0.05
    """Dropout before the adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vision_lr", "projector_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
        if self.vision_lr is not None and not self.train_vision:
            raise ValueError(f"--vision-lr has no effect without --train-vision, got {self.vision_lr}")
        if self.lora is None and self.lora_alpha is not None:
            raise ValueError(f"--lora-alpha has no effect without --lora, got {self.lora_alpha}")

    @property
    def trainable(self) -> Trainable:
        return "all" if self.train_vision else "language"

    @property
    def adapters(self) -> Lora | None:
        if self.lora is None:
            return None
        alpha = 2 * self.lora if self.lora_alpha is None else self.lora_alpha
        return Lora(self.lora, alpha, self.lora_dropout)

    @property
    def lr_scales(self) -> dict[str, float]:
        given = {_VISION: self.vision_lr, _PROJECTOR: self.projector_lr, _NEWLINE: self.projector_lr}
        return {name: lr / self.optim.lr for name, lr in given.items() if lr is not None}


@dataclass(frozen=True)
class _Begin:
    """What a new run starts from: its shape, weights by our names, and its language model."""

    config: LlavaConfig
    state: dict[str, Tensor]
    language: Language


def _pinpoints(side: int) -> tuple[tuple[int, int], ...]:
    """NeXT's, for a tower of this image size."""
    return ((side, 2 * side), (2 * side, side), (2 * side, 2 * side), (3 * side, side), (side, 3 * side))


def _begin(config: LlavaStage1Config | LlavaStage2Config, data: ChatData) -> _Begin:
    """On rank 0, of a new run."""
    check_llm_steps(config.llm, config.llm_steps)
    if isinstance(config, LlavaStage1Config):
        if config.vision is None:
            raise ValueError("--vision must be given: the frozen image tower")
        if config.llm is None:
            raise ValueError(f"--llm must be a language model's folder or {TINY!r}, got nothing")
        tower = load_tower(config.vision)
        pinpoints = _pinpoints(tower.config.image_size) if config.anyres else ()
        shape = LlavaConfig(tower.config, config.projector, pinpoints)
        state = {f"visual.{name}": x for name, x in tower.state.items()}
        if config.llm == TINY:
            language = tiny_language(lambda: _said(data), seed=config.run.seed, steps=config.llm_steps)
        else:
            language = read_language(Path(config.llm))
        return _Begin(shape, state, language)
    if config.start is None:
        raise ValueError(f"--from must be given: a run of {LLAVA_STAGE1}")
    run = find_run(config.start)
    state, shape = _start_state(config), read_llava(run).config
    moved = None if config.llm is None else Path(config.llm)
    folder = language_model_folder(run.folder, run.saved["model"], moved)
    return _Begin(shape, state, read_language(folder))


def _start_state(config: LlavaStage2Config) -> dict[str, Tensor]:
    """Weights of the run of --from, what its adapters learned among those of the language model."""
    assert config.start is not None
    run = find_run(config.start)
    read = read_llava(run)
    if read.lora is None:
        return read.state
    merged = llava_of(run, None if config.llm is None else Path(config.llm))
    return {name: p.detach() for name, p in merged.named_parameters()}  # tied ones once


def _said(data: ChatData) -> list[list[Said]]:
    """What a tiny language model learns of each picture: what is asked and answered."""
    found = []
    for conversation in data.train.conversations:
        turns = conversation.turns
        pairs = pairwise(turns)
        asked = [(q.text.replace(IMAGE, "").strip(), a.text) for q, a in pairs if a.role == "assistant"]
        found.append([*asked, *(("", answer) for _, answer in asked)])
    return found


def _prepare_folder(
    name: str, config: LlavaStage1Config | LlavaStage2Config, data: ChatData, world_size: int
) -> Start:
    """On rank 0: checks everything that a user can get wrong, and only then writes the run's folder."""
    start, adapters = open_run(name, config.run), config.adapters
    if start.checkpoint is not None:
        tokens = _tokens(config, load_language_tokenizer(_language_folder(config, start)))
        _loader(config, data, tokens, _shape(start), 0, world_size)
        return write_folder(name, config, start, world_size, lambda _: {})
    begin = _begin(config, data)
    _loader(config, data, _tokens(config, begin.language.tokenizer), begin.config, 0, world_size)

    def save(folder: Path) -> dict[str, Any]:
        kept = {n: x.contiguous() for n, x in begin.state.items() if not n.startswith(config.learned)}
        if kept:
            save_file(kept, folder / FROZEN)
        language = begin.language.save(folder)
        return {**asdict(begin.config), LORA: adapters and asdict(adapters), LANGUAGE_MODEL: language}

    return write_folder(name, config, start, world_size, save)


def _tokens(config: LlavaStage1Config | LlavaStage2Config, tokenizer: Any) -> ChatTokens:
    return ChatTokens(tokenizer, config.template, config.max_length)


def _loader(
    config: LlavaRecipe, data: ChatData, tokens: ChatTokens, shape: LlavaConfig, rank: int, world_size: int
) -> MapLoader[ChatTrainBatch]:
    spec = config.loader_spec(shape.vision.image_size, rank, world_size)
    return chat_loader(data.train, spec, tokens, shape, is_packed=config.pack, accum=config.run.accum)


def _saved(start: Start) -> dict[str, Any]:
    return json.loads((start.folder / "config.json").read_text())["model"]


def _shape(start: Start) -> LlavaConfig:
    return llava_shape(_saved(start))[0]


def _language_folder(config: LlavaRecipe, start: Start) -> Path:
    moved = None if start.checkpoint is None or config.llm in (None, TINY) else Path(config.llm)
    return language_model_folder(start.folder, _saved(start), moved)


def _make_model(
    config: LlavaStage1Config | LlavaStage2Config, start: Start, folder: Path, world_size: int
) -> Llava:
    torch.manual_seed(config.run.seed)
    _, precision = config.deepspeed(world_size)
    is_learned = _LANGUAGE in config.learned
    # what learns is float32 where a master of it is not the engine's
    dtype = torch.float32 if precision == "fp32" or (is_learned and precision != "bf16") else torch.bfloat16
    language = load_language_model(folder, dtype=dtype)
    language.set_attn_implementation(ATTENTION)
    model = Llava(_shape(start), language, trainable=config.trainable)
    frozen = start.folder / FROZEN
    state = load_file(frozen) if frozen.is_file() else {}
    if start.checkpoint is not None:
        state |= dict(checkpoint.tensors(start.checkpoint, "weight"))
    elif isinstance(config, LlavaStage2Config):
        state = _start_state(config) | state
    else:  # the projector starts anew
        state |= {n: x for n, x in model.state_dict().items() if n.startswith(config.learned)}
    load_trained(model, config.adapters, state)
    model.set_activation_checkpointing(config.activation_checkpointing)
    return model


def llava_backward(engine: Engine, parts: Sequence[ChatPart]) -> Tensor:
    """Loss and gradient of a step: the mean over what all parts of all ranks learn, at the memory of one part.

    Args:
        engine: a Llava under the engine.
        parts: of this rank; as many on every rank.

    Returns:
        [] the detached loss.
    """
    counts = [(learned_labels(part.labels, part.position_ids) != IGNORED).sum() for part in parts]
    count, losses = torch.stack(counts).sum().to(engine.device), []
    with engine.accumulate() if len(parts) > 1 else nullcontext():
        for i, part in enumerate(parts, 1):
            total, _ = engine("loss", *part.to(engine.device))
            loss = global_ratio(total, count)
            engine.backward(loss, last=i == len(parts))
            losses.append(loss.detach())
    return torch.stack(losses).sum()


def train_llava(name: str, config: LlavaStage1Config | LlavaStage2Config) -> Path:
    """Trains as `config` says, on every rank alike; returns the run's folder.

    Raises:
        ValueError: something in the configuration, the data or the run's folder is wrong.
        FloatingPointError: a loss or the gradient stopped being finite.
    """
    register()
    rank, world_size = init_distributed()
    data = open_chats(config.data, seed=config.run.seed, captions_only=config.template == "plain")
    start: Start = on_rank_zero(lambda: _prepare_folder(name, config, data, world_size))
    folder = on_rank_zero(lambda: _language_folder(config, start))
    model = _make_model(config, start, folder, world_size)
    tokens = _tokens(config, load_language_tokenizer(folder))
    loader = _loader(config, data, tokens, model.config, rank, world_size)

    def evaluate(engine: Engine) -> dict[str, float]:
        if data.val is None:
            return {}
        options: Any = {"device": engine.device, "most": MAX_EVALUATED, "max_new_tokens": config.max_answer}
        return {"answer accuracy": accuracy(replies(engine, tokens, model.config, data.val, **options))}

    def backward(engine: Engine, step: int, batch: ChatTrainBatch) -> dict[str, Tensor]:
        seed_step(config.run.seed, step)
        return {"loss": llava_backward(engine, batch.parts)}

    what = f"LLaVA on {model.language_model.config.model_type}"
    records = run_recipe(config, start, what, model, data, loader, backward=backward, evaluate=evaluate)
    if rank == 0:
        report(load_run(start.folder), data, records)
    return start.folder
