"""Trains LLaVA, both stages: the recipes."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.data.chats import ChatData, open_chats
from mmcore.data.loader import MapLoader
from mmcore.data.sources.conversations import IMAGE
from mmcore.data.text.templates import TEMPLATES, ChatTokens
from mmcore.integrations.transformers import NAME as ATTENTION
from mmcore.integrations.transformers import register
from mmcore.labels import IGNORED
from mmcore.losses import global_ratio
from mmcore.parts.language import load_language_model, load_language_tokenizer
from mmcore.parts.language_folder import LANGUAGE_MODEL, language_model_folder
from mmcore.parts.language_source import TINY, Language, check_llm_steps, read_language, tiny_language
from mmcore.parts.tiny_lm import Said
from mmcore.parts.towers import load_tower
from mmcore.runs import FROZEN, LLAVA_STAGE1
from mmcore.systems.llava.config import LANGUAGE, NEWLINE, LlavaRecipe, LlavaStage1Config, LlavaStage2Config
from mmcore.systems.llava.evaluate import load_run, report
from mmcore.systems.llava.loader import ChatPart, ChatTrainBatch, chat_loader
from mmcore.systems.llava.model import Llava, LlavaConfig, learned_labels
from mmcore.systems.llava.runs import LORA, llava_shape, load_trained
from mmcore.systems.llava.start import LlavaStart, llava_start, next_pinpoints
from mmcore.tasks.chat import accuracy, answers_recur, replies
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.loop import on_rank_zero, seed_step
from mmcore.train.recipe import run_recipe, write_folder
from mmcore.train.run import Start, open_run

# of what --llm tiny is trained on
TINY_TEMPLATE = "v1"
# Conversations that a run is measured on while it trains.
MAX_EVALUATED = 96


@dataclass(frozen=True)
class _Begin:
    """What a new run starts from: its shape, weights by our names, and its language model."""

    config: LlavaConfig
    state: dict[str, Tensor]
    language: Language


def _begin(config: LlavaStage1Config | LlavaStage2Config, data: ChatData) -> _Begin:
    """On rank 0, of a new run."""
    check_llm_steps(config.llm, config.llm_steps)
    if isinstance(config, LlavaStage2Config):
        start = _start_of(config)
        return _Begin(start.config, start.state, read_language(start.llm))
    if config.vision is None:
        raise ValueError("--vision must be given: the frozen image tower")
    if config.llm is None:
        raise ValueError(f"--llm must be a language model's folder or {TINY!r}, got nothing")
    tower = load_tower(config.vision)
    pinpoints = next_pinpoints(tower.config.image_size) if config.anyres else ()
    shape = LlavaConfig(tower.config, config.projector, pinpoints)
    state = {f"visual.{name}": x for name, x in tower.state.items()}
    if config.llm == TINY:
        language = tiny_language(lambda: _said(data), seed=config.run.seed, steps=config.llm_steps)
    else:
        language = read_language(Path(config.llm))
    return _Begin(shape, state, language)


def _start_of(config: LlavaStage2Config) -> LlavaStart:
    if config.start is None:
        raise ValueError(f"--from must be given: a run of {LLAVA_STAGE1}, or what else it starts from")
    llm = None if config.llm is None else Path(config.llm)
    return llava_start(config.start, llm=llm, vision=config.vision, anyres=config.anyres)


def _said(data: ChatData) -> list[list[Said]]:
    """What a tiny language model learns of each picture: what is asked and answered, as stage 2 will write it."""
    template, found = TEMPLATES[TINY_TEMPLATE], []
    system = template.system.join(template.system_marks)
    for conversation in data.train.conversations:
        asked = []
        for question, answer in pairwise(conversation.turns):
            if answer.role == "assistant":
                text = question.text.replace(IMAGE, "").strip().join(template.user_marks)
                asked.append((f"{system}{text}{template.answer_mark}", answer.text))
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
    model = Llava(begin.config, begin.language.model)
    load_trained(model, None, _new(config, model) | begin.state)

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


def _new(config: LlavaStage1Config | LlavaStage2Config, model: Llava) -> dict[str, Tensor]:
    """The weights of a new model that nothing gives: stage 1's projector, and the end of a tile's row."""
    begin_anew = NEWLINE if isinstance(config, LlavaStage2Config) else config.learned
    return {name: x for name, x in model.state_dict().items() if name.startswith(begin_anew)}


def _make_model(
    config: LlavaStage1Config | LlavaStage2Config, start: Start, folder: Path, world_size: int
) -> Llava:
    torch.manual_seed(config.run.seed)
    _, precision = config.deepspeed(world_size)
    is_learned = LANGUAGE in config.learned
    # what learns is float32 where a master of it is not the engine's
    dtype = torch.float32 if precision == "fp32" or (is_learned and precision != "bf16") else torch.bfloat16
    language = load_language_model(folder, dtype=dtype)
    language.set_attn_implementation(ATTENTION)
    model = Llava(_shape(start), language, trainable=config.trainable)
    frozen = start.folder / FROZEN
    state = load_file(frozen) if frozen.is_file() else {}
    if start.checkpoint is not None:
        state |= dict(checkpoint.tensors(start.checkpoint, "weight"))
    else:
        given = _start_of(config).state if isinstance(config, LlavaStage2Config) else {}
        state = _new(config, model) | given | state
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

    has_accuracy = data.val is not None and answers_recur(data.train, data.val)

    def evaluate(engine: Engine) -> dict[str, float]:
        if data.val is None or not has_accuracy:
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
