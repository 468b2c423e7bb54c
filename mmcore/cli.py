"""The `mmcore` command: train, eval, chat, export, plan."""

import importlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmcore.checkpoint import write_json
from mmcore.data import DataConfig
from mmcore.data.held_out import open_held_out
from mmcore.data.text.prompts import Task
from mmcore.data.transforms.images import image_processor_config
from mmcore.errors import complain
from mmcore.runs import BLIP2_STAGE1, BLIP2_STAGE2, LLAVA_STAGE1, LLAVA_STAGE2, WEIGHTS, WeightsKey, find_run
from mmcore.systems.blip2 import retrieval as blip2
from mmcore.systems.blip2.weights import save_blip2
from mmcore.systems.clip.evaluate import load_run, print_retrieval, print_zero_shot
from mmcore.systems.clip.weights import save_clip
from mmcore.tasks.answers import Decoding
from mmcore.tasks.speaker import print_captions, print_vqa

_USAGE = """usage: mmcore COMMAND ...

  mmcore train clip [options]            train CLIP; --help explains every option
  mmcore train blip2-stage1 [options]    train BLIP-2's Q-Former
  mmcore train blip2-stage2 [options]    train it in front of a frozen language model
  mmcore train llava-stage1 [options]    train LLaVA's projector
  mmcore train llava-stage2 [options]    train it and the language model on conversations
  mmcore eval zeroshot|retrieval RUN     measure a run on its held-out pairs
  mmcore eval caption|vqa RUN            let it describe held-out pictures, or answer questions about them
  mmcore chat RUN --image FILE           ask a LLaVA about images, question after question
  mmcore export RUN --out FOLDER         write its weights for transformers or open_clip
  mmcore plan clip|blip2|llava [options] memory, FLOP, transfers and time of a run, before it is started
"""


@dataclass(frozen=True)
class EvalConfig:
    """Measure a run on its held-out pairs."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its newest checkpoint is used), or one checkpoint of it."""
    weights: WeightsKey = "auto"
    """ema = the averaged weights, weight = the trained ones, auto = ema where the run kept one."""


@dataclass(frozen=True)
class SpeakConfig(EvalConfig):
    """Let a run of BLIP-2 or LLaVA describe held-out pictures, or answer questions about them, and measure what it
    says."""

    data: str | None = None
    """Pictures with captions, or with questions: a table, a JSON file or shards, all of it; None = what the run held
    out."""
    annotations: str | None = None
    """VQAv2's file of the answers to the questions of --data."""
    image_root: str | None = None
    """Folder of the images of --data; None = that of the file."""
    prompt: str | None = None
    """Text before the caption, or the question's, with {} in its place; None = as it was trained, and of LLaVA that
    was trained on conversations, as published."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)
    llm: Path | None = None
    """Where the run's language model is now; None = where it was."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's weights as a folder that transformers or open_clip loads."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its newest checkpoint is used), or one checkpoint of it."""
    out: Path
    """Folder to write, which must not exist."""
    format: Literal["hf", "open_clip"] = "hf"
    """hf: as transformers' from_pretrained reads them; open_clip: a CLIP under its names."""
    llm: Path | None = None
    """Where the language model of a run of blip2-stage2 or LLaVA is now; None = where it was."""
    weights: WeightsKey = "auto"
    """ema = the averaged weights, weight = the trained ones, auto = ema where the run kept one."""


def _train(arguments: list[str]) -> None:
    # Loaded by name: eval and export serve where DeepSpeed is not installed, and start three times as fast.
    importlib.import_module("mmcore.train.launch").main(arguments)


def _eval(arguments: list[str]) -> None:
    kinds = {"zeroshot": print_zero_shot, "retrieval": print_retrieval}
    spoken: dict[str, Task] = {"caption": "caption", "vqa": "vqa"}
    kind = arguments[0] if arguments else None
    if kind not in (*kinds, *spoken):
        got = "nothing" if kind is None else repr(kind)
        raise ValueError(f"mmcore eval must be followed by zeroshot, retrieval, caption or vqa, got {got}")
    prog = f"mmcore eval {kind}"
    if kind in spoken:
        _speak(spoken[kind], tyro.cli(SpeakConfig, args=arguments[1:], prog=prog))
        return
    config = tyro.cli(EvalConfig, args=arguments[1:], prog=prog)
    if kind == "retrieval" and find_run(config.run).recipe == BLIP2_STAGE1:
        blip2.print_measured(blip2.load_run(config.run, config.weights))
    else:
        kinds[kind](load_run(config.run, config.weights))


def _speak(task: Task, config: SpeakConfig) -> None:
    recipe = find_run(config.run).recipe
    is_llava = recipe in (LLAVA_STAGE1, LLAVA_STAGE2)
    # loaded by name: what else is measured does without transformers
    models = importlib.import_module(f"mmcore.systems.{'llava.evaluate' if is_llava else 'blip2.speaker'}")
    if config.data is None and (config.annotations or config.image_root):
        given = config.annotations or config.image_root
        raise ValueError(f"--annotations and --image-root have no effect without --data, got {given}")
    if is_llava and task == "vqa" and config.data is None:
        if config.prompt is not None:
            raise ValueError(f"--prompt has no effect on conversations without --data, got {config.prompt!r}")
        trained = models.load_run(config.run, config.weights, config.llm)
        files = models.print_answers(trained, models.chats_of(trained.run), config.decoding)
    else:
        data = None
        if config.data is not None:
            given = DataConfig(config.data, annotations=config.annotations, image_root=config.image_root)
            data = open_held_out(given)
        speaker = models.load_speaker(config.run, config.weights, config.llm, data)
        if config.prompt is not None and task in speaker.prompts:
            speaker = replace(speaker, prompts={**speaker.prompts, task: config.prompt})
        files = {"caption": print_captions, "vqa": print_vqa}[task](speaker, config.decoding)
    for file in files:
        print(f"  {file}")


def _export(arguments: list[str]) -> None:
    config = tyro.cli(ExportConfig, args=arguments, prog="mmcore export")
    recipe = find_run(config.run).recipe
    has_language = recipe in (BLIP2_STAGE2, LLAVA_STAGE1, LLAVA_STAGE2)
    if recipe != "clip" and config.format != "hf":
        raise ValueError(f"--format must be hf for a run of {recipe}, got {config.format}")
    if not has_language and config.llm is not None:
        raise ValueError(f"--llm has no effect on a run of {recipe}, got {config.llm}")
    if has_language:
        kind = "blip2.start" if recipe == BLIP2_STAGE2 else "llava.runs"
        export = importlib.import_module(f"mmcore.systems.{kind}").export
        shape, step, weights = export(config.run, config.out, config.weights, config.llm)
        if recipe == BLIP2_STAGE2:
            settings = image_processor_config(shape)
        else:
            settings = importlib.import_module("mmcore.systems.llava.loader").processor_config(shape)
    elif recipe == BLIP2_STAGE1:
        trained = blip2.load_run(config.run, config.weights)
        save_blip2(trained.model, config.out)
        trained.wordpiece.save(config.out)
        settings = image_processor_config(trained.model.config.vision.image_size)
        step, weights = trained.step, trained.weights
    else:
        run = load_run(config.run, config.weights)
        save_clip(run.model, config.out, format=config.format)
        run.tokenizer.save(config.out)
        settings = image_processor_config(run.model.config.vision.image_size)
        step, weights = run.step, run.weights
    if config.format == "hf":
        write_json(config.out / "preprocessor_config.json", settings)
    print(f"{WEIGHTS[weights]} of step {step} written to {config.out} ({config.format})")


def _chat(arguments: list[str]) -> None:
    # loaded by name: the others do without transformers
    importlib.import_module("mmcore.tasks.terminal").main(arguments)


def _plan(arguments: list[str]) -> None:
    # loaded by name, as training is
    importlib.import_module("mmcore.plan.command").main(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 2 and one sentence for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": _train, "eval": _eval, "chat": _chat, "export": _export, "plan": _plan}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    try:
        if arguments[0] not in commands:
            raise ValueError(f"the command must be train, eval, chat, export or plan, got {arguments[0]!r}")
        commands[arguments[0]](arguments[1:])
    except (ValueError, OSError) as error:
        sys.exit(complain(error, 2))
