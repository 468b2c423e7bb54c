"""The `mmcore` command: train, eval, export."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmcore.checkpoint import write_json
from mmcore.data.images import image_processor_config
from mmcore.errors import complain
from mmcore.eval import blip2
from mmcore.eval.clip import WEIGHTS, load_run, print_retrieval, print_zero_shot
from mmcore.models.blip2_weights import save_blip2
from mmcore.models.clip_weights import save_clip
from mmcore.models.runs import BLIP2_STAGE1, WeightsKey, find_run

_USAGE = """usage: mmcore COMMAND ...

  mmcore train clip [options]            train CLIP; --help explains every option
  mmcore train blip2-stage1 [options]    train BLIP-2's Q-Former
  mmcore eval zeroshot|retrieval RUN     measure a run on its held-out pairs
  mmcore export RUN --out FOLDER         write its weights for transformers or open_clip
"""


@dataclass(frozen=True)
class EvalConfig:
    """Measure a trained CLIP on the held-out pairs of its run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its newest checkpoint is used), or one checkpoint of it."""
    weights: WeightsKey = "auto"
    """ema = the averaged weights, weight = the trained ones, auto = ema where the run kept one."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's weights as a folder that transformers or open_clip loads."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its newest checkpoint is used), or one checkpoint of it."""
    out: Path
    """Folder to write, which must not exist."""
    format: Literal["hf", "open_clip"] = "hf"
    """hf: config.json and model.safetensors, for CLIPModel.from_pretrained; open_clip: its names and config."""
    weights: WeightsKey = "auto"
    """ema = the averaged weights, weight = the trained ones, auto = ema where the run kept one."""


def _train(arguments: list[str]) -> None:
    # Loaded by name: eval and export serve where DeepSpeed is not installed, and start three times as fast.
    importlib.import_module("mmcore.train.launch").main(arguments)


def _eval(arguments: list[str]) -> None:
    kinds = {"zeroshot": print_zero_shot, "retrieval": print_retrieval}
    if not arguments or arguments[0] not in kinds:
        got = f"got {arguments[0]!r}" if arguments else "got nothing"
        raise ValueError(f"mmcore eval must be followed by zeroshot or retrieval, {got}")
    config = tyro.cli(EvalConfig, args=arguments[1:], prog=f"mmcore eval {arguments[0]}")
    if arguments[0] == "retrieval" and find_run(config.run).recipe == BLIP2_STAGE1:
        blip2.print_measured(blip2.load_run(config.run, config.weights))
    else:
        kinds[arguments[0]](load_run(config.run, config.weights))


def _export(arguments: list[str]) -> None:
    config = tyro.cli(ExportConfig, args=arguments, prog="mmcore export")
    if find_run(config.run).recipe == BLIP2_STAGE1:
        if config.format != "hf":
            raise ValueError(f"--format must be hf for a run of {BLIP2_STAGE1}, got {config.format}")
        trained = blip2.load_run(config.run, config.weights)
        save_blip2(trained.model, config.out)
        trained.wordpiece.save(config.out)
        size, step, weights = trained.model.config.vision.image_size, trained.step, trained.weights
    else:
        run = load_run(config.run, config.weights)
        save_clip(run.model, config.out, format=config.format)
        run.tokenizer.save(config.out)
        size, step, weights = run.model.config.vision.image_size, run.step, run.weights
    if config.format == "hf":
        write_json(config.out / "preprocessor_config.json", image_processor_config(size))
    print(f"{WEIGHTS[weights]} of step {step} written to {config.out} ({config.format})")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 2 and one sentence for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": _train, "eval": _eval, "export": _export}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    try:
        if arguments[0] not in commands:
            raise ValueError(f"the command must be train, eval or export, got {arguments[0]!r}")
        commands[arguments[0]](arguments[1:])
    except (ValueError, OSError) as error:
        sys.exit(complain(error, 2))
