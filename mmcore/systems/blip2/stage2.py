"""Trains BLIP-2's second stage: the recipe."""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcore import checkpoint
from mmcore.data import Batch, LoaderSpec, PairData, TrainLoader, open_data
from mmcore.data.text.prompts import Prompted, PromptTokens, Task, prompt_texts
from mmcore.parts.language import load_language_model, load_language_tokenizer
from mmcore.parts.language_folder import LANGUAGE_MODEL, language_model_folder
from mmcore.parts.language_source import TINY, check_llm_steps, read_language, tiny_language
from mmcore.parts.tiny_lm import Said, texts_by_picture
from mmcore.parts.vit import VisionConfig
from mmcore.runs import BLIP2_STAGE1, BLIP2_STAGE2, FROZEN, find_run, is_run
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.qformer import QFormerConfig
from mmcore.systems.blip2.speaker import load_speaker, report
from mmcore.systems.blip2.start import has_language_model, stage2_start
from mmcore.systems.blip2.steps import stage2_backward
from mmcore.tasks.answers import Decoding, answer, caption, language_answerer
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.loop import on_rank_zero, seed_step
from mmcore.train.optim import OptimConfig, blip2_optim
from mmcore.train.recipe import Recipe, run_recipe, write_folder
from mmcore.train.run import Start, open_run

# Pictures or questions that a run is measured on while it trains.
MAX_EVALUATED = 256


@dataclass(frozen=True)
class Blip2Stage2Config(Recipe):
    """Train BLIP-2's Q-Former in front of a frozen language model (arXiv 2301.12597, stage 2): captions, answers."""

    optim: OptimConfig = field(default_factory=partial(blip2_optim, 2000))
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """What to start from: a run of mmcore train blip2-stage1 or blip2-stage2, or a folder with a BLIP-2 of
    transformers. A resumed run needs none."""
    llm: str | None = None
    """The frozen language model: a folder of transformers (OPT, Llama, Qwen, T5; safetensors), or 'tiny', one that is
    trained from nothing on the texts of --data first; None = that of --from, or of the run that is resumed."""
    llm_steps: int | None = None
    """Steps that --llm tiny is trained for first; None = 400."""
    task: Task = "caption"
    """caption = describe the image; vqa = answer the questions of --data."""
    prompt: str | None = None
    """Text before what is learned, with {} for the question; None = nothing for captions, 'Question: {} Answer:' for
    questions."""
    max_text: int = 32
    """Tokens of a caption or answer, its end included."""

    def loader(self, data: PairData, spec: LoaderSpec) -> TrainLoader:
        """Batches of pictures with captions, or with questions and answers."""
        return data.question_loader(spec, None) if self.task == "vqa" else data.train_loader(spec, None)

    def texts(self, batch: Batch, tokens: PromptTokens) -> Prompted:
        """What a batch has to learn."""
        questions = batch.questions or [""] * len(batch.captions)
        return tokens.pairs(prompt_texts(self.task, self.prompt, questions), batch.captions)


def _prepare_folder(config: Blip2Stage2Config, data: PairData, world_size: int) -> Start:
    """On rank 0: checks everything that a user can get wrong, and only then writes the run's folder."""
    start, accum = open_run(BLIP2_STAGE2, config.run), config.run.accum
    if accum != 1:
        raise ValueError(f"--accum must be 1 with {BLIP2_STAGE2}, got {accum}: give each rank a larger batch")
    prompt_texts(config.task, config.prompt, [""])
    check_llm_steps(config.llm, config.llm_steps)
    if start.checkpoint is not None:
        _language_folder(config, start)
        config.loader(data, config.loader_spec(_shape(start)[0].image_size, 0, world_size))
        return write_folder(BLIP2_STAGE2, config, start, world_size, lambda _: {})
    if config.start is None:
        raise ValueError(
            f"--from must be given: a run of {BLIP2_STAGE1}, or what else {BLIP2_STAGE2} starts from"
        )
    vision, qformer, state = stage2_start(config.start)
    config.loader(data, config.loader_spec(vision.image_size, 0, world_size))
    if config.llm == TINY:
        language = tiny_language(lambda: _said(config, data), seed=config.run.seed, steps=config.llm_steps)
    else:
        language = read_language(_given_language(config))
    _tokens(config, language.model, language.tokenizer)
    BLIP2LM(vision, qformer, language.model).load_start(state)

    def save(folder: Path) -> dict[str, Any]:
        frozen = {name: x.contiguous() for name, x in state.items() if name.startswith("visual.")}
        save_file(frozen, folder / FROZEN)
        known = language.save(folder)
        return {"vision": asdict(vision), "qformer": asdict(qformer), LANGUAGE_MODEL: known}

    return write_folder(BLIP2_STAGE2, config, start, world_size, save)


def _given_language(config: Blip2Stage2Config) -> Path:
    """That of --llm, else of --from."""
    if config.llm is not None:
        return Path(config.llm)
    assert config.start is not None
    if has_language_model(config.start):
        return config.start
    if is_run(config.start):
        run = find_run(config.start)
        if run.recipe == BLIP2_STAGE2:
            return language_model_folder(run.folder, run.saved["model"])
    raise ValueError(f"--llm must be a language model's folder or {TINY!r}: {config.start} has none")


def _said(config: Blip2Stage2Config, data: PairData) -> list[list[Said]]:
    """What a tiny language model learns: what the data says, in the words in which it will be asked."""
    return texts_by_picture(
        data, **{f"{'question' if config.task == 'vqa' else 'caption'}_prompt": config.prompt}
    )


def _shape(start: Start) -> tuple[VisionConfig, QFormerConfig]:
    saved = json.loads((start.folder / "config.json").read_text())["model"]
    return VisionConfig(**saved["vision"]), QFormerConfig(**saved["qformer"])


def _language_folder(config: Blip2Stage2Config, start: Start) -> Path:
    saved = json.loads((start.folder / "config.json").read_text())["model"]
    moved = None if start.checkpoint is None or config.llm in (None, TINY) else Path(config.llm)
    return language_model_folder(start.folder, saved, moved)


def _tokens(config: Blip2Stage2Config, language: Any, tokenizer: Any) -> PromptTokens:
    is_encoder_decoder = language.config.is_encoder_decoder
    return PromptTokens(tokenizer, is_encoder_decoder=is_encoder_decoder, max_answer=config.max_text)


def _make_model(config: Blip2Stage2Config, start: Start, folder: Path, world_size: int) -> BLIP2LM:
    torch.manual_seed(config.run.seed)
    _, precision = config.deepspeed(world_size)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = BLIP2LM(*_shape(start), load_language_model(folder, dtype=dtype))
    if start.checkpoint is None:
        assert config.start is not None
        model.load_start(stage2_start(config.start).state)
    else:
        trained = dict(checkpoint.tensors(start.checkpoint, "weight"))
        model.load_start(trained | load_file(start.folder / FROZEN))
    return model


def train_blip2_stage2(config: Blip2Stage2Config) -> Path:
    """Trains as `config` says, on every rank alike; returns the run's folder.

    Raises:
        ValueError: something in the configuration, the data or the run's folder is wrong.
        FloatingPointError: a loss or the gradient stopped being finite.
    """
    rank, world_size = init_distributed()
    data = open_data(config.data, seed=config.run.seed)
    start: Start = on_rank_zero(lambda: _prepare_folder(config, data, world_size))
    folder = on_rank_zero(lambda: _language_folder(config, start))
    model = _make_model(config, start, folder, world_size)
    tokens = _tokens(config, model.language_model, load_language_tokenizer(folder))
    image_size = model.visual.config.image_size
    loader = config.loader(data, config.loader_spec(image_size, rank, world_size))

    def evaluate(engine: Engine) -> dict[str, float]:
        says = language_answerer(engine, tokens, image_size, engine.device, Decoding())
        options: Any = {"prompt": config.prompt, "most": MAX_EVALUATED}
        if config.task == "caption" and data.val is not None:
            return caption(says, data.val, **options).scores
        if config.task == "vqa" and data.val_questions is not None:
            return {"VQA accuracy": answer(says, data.val_questions, **options).accuracy}
        return {}

    def backward(engine: Engine, step: int, batch: Batch) -> dict[str, Tensor]:
        seed_step(config.run.seed, step)
        texts = config.texts(batch, tokens).to(engine.device)
        return stage2_backward(engine, batch.images.to(engine.device), texts)

    what = f"a Q-Former before {model.language_model.config.model_type}"
    records = run_recipe(config, start, what, model, data, loader, backward=backward, evaluate=evaluate)
    if rank == 0:
        report(load_speaker(start.folder), records)
    return start.folder
