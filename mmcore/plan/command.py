"""`mmcore plan RECIPE`: what a run will take, before a GPU is asked for."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import tyro
from rich.console import Console

from mmcore.plan.hardware import GPUS
from mmcore.plan.job import Job, Precision, Setting
from mmcore.plan.report import as_json, plan, show
from mmcore.runs import BLIP2_STAGE1, BLIP2_STAGE2
from mmcore.systems.blip2.plan import blip2_stage1_job
from mmcore.systems.clip.plan import clip_job
from mmcore.systems.llava.model import LORA_DROPOUT, Lora
from mmcore.systems.llava.runs import LLAVA_STAGE1, LLAVA_STAGE2

# Loaded by name: transformers takes seconds, and CLIP needs none of it.
LANGUAGE_JOBS = "mmcore.systems.llava.plan"
SHORT = {"blip2": BLIP2_STAGE1, "llava": LLAVA_STAGE2}
"""What is meant by a model's name alone: BLIP-2's first stage, LLaVA's second, which needs most."""


@dataclass(frozen=True)
class PlanConfig:
    """What all recipes have in common."""

    global_batch: int
    """Samples a step, of all ranks."""
    gpus: int
    """Data-parallel ranks."""
    gpu: Literal["a100-40gb", "a100-80gb", "a800", "h100", "h200", "b200"] = "h200"
    """Which GPU."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    precision: Precision = "amp_bf16"
    """fp32; amp_bf16 (fp32 weights, bf16 autocast); bf16 (bf16 weights, fp32 master)."""
    ema: bool = False
    """Keep an average of the weights."""
    json: bool = False
    """Print JSON: bytes, FLOP and seconds of a rank."""

    def setting(self) -> Setting:
        """The options that a run has, of those that the recipe has."""
        names = [x.name for x in fields(Setting)]
        return Setting(**{name: getattr(self, name) for name in names if hasattr(self, name)})


@dataclass(frozen=True)
class MicroBatchPlan(PlanConfig):
    """What recipes have in common that can do with less memory and more time."""

    accum: int = 1
    """Micro-batches a step."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward."""


@dataclass(frozen=True)
class ClipPlan(MicroBatchPlan):
    """Plan a run of mmcore train clip."""

    model: str = "ViT-L-14"
    """As --model of mmcore train clip."""

    def job(self) -> Job:
        return clip_job(self.model)


@dataclass(frozen=True)
class Blip2Stage1Plan(PlanConfig):
    """Plan a run of mmcore train blip2-stage1 on a frozen image tower."""

    model: str = "ViT-g"
    """As --model of mmcore train blip2-stage1."""
    max_text: int = 32
    """Tokens of a caption, [CLS] and [SEP] included."""

    def job(self) -> Job:
        return blip2_stage1_job(self.model, self.max_text)


@dataclass(frozen=True)
class Blip2Stage2Plan(PlanConfig):
    """Plan a run of mmcore train blip2-stage2."""

    model: str = "ViT-g"
    """Shape of tower and Q-Former, as --model of mmcore train blip2-stage1."""
    llm: str = "opt-2.7b"
    """vicuna-7b, vicuna-13b, llama-3-8b, qwen2-0.5b, qwen2-7b, opt-2.7b, opt-6.7b, or a folder with the config.json of
    a causal model of transformers."""
    max_text: int = 32
    """Tokens of prompt and answer."""

    def job(self) -> Job:
        return importlib.import_module(LANGUAGE_JOBS).blip2_stage2_job(self.model, self.llm, self.max_text)


@dataclass(frozen=True)
class LlavaPlan(MicroBatchPlan):
    """Plan a run of LLaVA."""

    vision: str = "ViT-L-14-336"
    """The CLIP whose tower, less its last layer, sees the images: a --model of mmcore train clip."""
    llm: str = "vicuna-7b"
    """vicuna-7b, vicuna-13b, llama-3-8b, qwen2-0.5b, qwen2-7b, opt-2.7b, opt-6.7b, or a folder with the config.json of
    a causal model of transformers."""
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """As --projector of mmcore train llava-stage1."""
    tokens: int | None = None
    """Tokens of a conversation, those of its image included; None = 64 beside the image in stage 1, and in stage 2 the
    most that a row holds, 2048."""


@dataclass(frozen=True)
class LlavaStage1Plan(LlavaPlan):
    """Plan a run of mmcore train llava-stage1."""

    def job(self) -> Job:
        return _llava_job(self, 1)


@dataclass(frozen=True)
class LlavaStage2Plan(LlavaPlan):
    """Plan a run of mmcore train llava-stage2."""

    train_vision: bool = False
    """Train the image tower too."""
    lora: int | None = None
    """Train adapters of this rank, as --lora of mmcore train llava-stage2."""

    def job(self) -> Job:
        lora = None if self.lora is None else Lora(self.lora, 2 * self.lora, LORA_DROPOUT)
        return _llava_job(self, 2, train_vision=self.train_vision, lora=lora)


def _llava_job(config: LlavaPlan, stage: int, **options: Any) -> Job:
    make: Callable[..., Job] = importlib.import_module(LANGUAGE_JOBS).llava_job
    options_of_both: dict[str, Any] = {"projector": config.projector, "num_tokens": config.tokens}
    return make(stage, config.vision, config.llm, **options_of_both, **options)


PLANS: dict[str, type[Any]] = {
    "clip": ClipPlan,
    BLIP2_STAGE1: Blip2Stage1Plan,
    BLIP2_STAGE2: Blip2Stage2Plan,
    LLAVA_STAGE1: LlavaStage1Plan,
    LLAVA_STAGE2: LlavaStage2Plan,
}


def main(arguments: list[str]) -> None:
    """Runs `clip ...`.

    Raises:
        ValueError: an unknown recipe, model or shape, or options that no run could have.
    """
    recipe = SHORT.get(arguments[0], arguments[0]) if arguments else None
    if recipe not in PLANS and recipe not in ("-h", "--help"):
        names = ", ".join((*PLANS, *SHORT))
        raise ValueError(f"mmcore plan must be followed by one of {names}, got {recipe or 'nothing'}")
    config = tyro.extras.subcommand_cli_from_dict(
        PLANS,
        args=[recipe, *arguments[1:]],
        prog="mmcore plan",
    )
    found = plan(config.job(), config.setting(), GPUS[config.gpu])
    if config.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(found, Console(highlight=False, soft_wrap=True))
