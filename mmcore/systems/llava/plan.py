"""LLaVA's stages as a plan sees them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mmcore.ops import require
from mmcore.parts.adapters import LORA_DROPOUT, Lora
from mmcore.plan import pieces
from mmcore.plan.demand import Built
from mmcore.plan.job import Job, MicroBatchPlan, Piece, Setting, numbers
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.llava.model import Llava, LlavaConfig, Trainable


def llava_job(
    stage: Literal[1, 2],
    vision_name: str,
    llm: str,
    *,
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu",
    num_tokens: int | None = None,
    train_vision: bool = False,
    lora: Lora | None = None,
) -> Job:
    """Of a CLIP's tower, less its last layer, before a language model; the options are those of `Stage2Plan`."""
    whole = clip_config(vision_name).vision
    vision = replace(whole, num_layers=whole.num_layers - 1)
    least = vision.num_patches + 2
    num_tokens = num_tokens or (vision.num_patches + 64 if stage == 1 else 2048)
    require(pieces.OP, num_tokens >= least, "--tokens must be at least {}, got {}", least, num_tokens)
    trainable = "projector" if stage == 1 else "all" if train_vision else "language"
    name = f"LLaVA stage {stage}, {vision_name} before {llm}"
    if lora is not None:
        name += f" with adapters of rank {lora.rank}"
    return llava_job_of(name, LlavaConfig(vision, projector), pieces.language_config(llm), trainable, num_tokens, lora)


def llava_job_of(
    name: str, config: LlavaConfig, language: Any, trainable: Trainable, num_tokens: int, lora: Lora | None = None
) -> Job:
    """Of any configuration, `language` one of transformers."""
    vision, learns = config.vision, trainable != "projector" and lora is None

    def adapted(config: LlavaConfig, model: Any) -> Llava:
        whole = Llava(config, model, trainable=trainable)
        if lora is not None:
            whole.add_adapters(lora)
        return whole

    def prepare(model: Any, setting: Setting) -> Any:
        whole = adapted(replace(config, vision=replace(vision, num_layers=1)), model)
        if setting.precision == "bf16":
            whole.bfloat16()  # the adapters, as its engine does
        whole.set_activation_checkpointing(setting.activation_checkpointing)
        return whole.train().language_model

    def project(_: int, samples: int, setting: Setting) -> Built:
        model = Llava(config, pieces.language_model(language, setting.dtype, num_layers=1))
        shape = (samples, vision.num_patches, vision.width)
        states = torch.empty(shape, requires_grad=trainable == "all")
        return Built(model.projector.parameters(), lambda: [model.projector(states)])

    with torch.device("meta"):
        of_model = numbers(adapted(config, pieces.language_model(language, torch.float32)))
    low = 0 if learns else pieces.language_numbers(language).trained
    return Job(
        name,
        (
            pieces.tower_piece(vision, learns=trainable == "all"),
            Piece("projector", 1, project),
            pieces.language_piece(language, num_tokens, num_tokens - 1, prepare, learns=learns),
        ),
        of_model.trained,
        pieces.image_bytes(vision) + 3 * 8 * num_tokens,
        frozen=of_model.frozen - low,
        frozen_low=low,
        small=of_model.small,
        levers=("accum", "activation_checkpointing", "zero"),
    )


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
class Stage1Plan(LlavaPlan):
    """Plan a run of mmcore train llava-stage1."""

    def job(self) -> Job:
        return llava_job(1, self.vision, self.llm, projector=self.projector, num_tokens=self.tokens)


@dataclass(frozen=True)
class Stage2Plan(LlavaPlan):
    """Plan a run of mmcore train llava-stage2."""

    train_vision: bool = False
    """Train the image tower too."""
    lora: int | None = None
    """Train adapters of this rank, as --lora of mmcore train llava-stage2."""

    def job(self) -> Job:
        lora = None if self.lora is None else Lora(self.lora, 2 * self.lora, LORA_DROPOUT)
        options: dict[str, Any] = {"train_vision": self.train_vision, "lora": lora}
        return llava_job(2, self.vision, self.llm, projector=self.projector, num_tokens=self.tokens, **options)
