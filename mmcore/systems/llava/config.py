"""LLaVA's recipes: the settings of both stages."""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmcore.data.chats import ChatConfig
from mmcore.systems.llava.model import LORA_DROPOUT, Lora, Trainable
from mmcore.train.optim import OptimConfig
from mmcore.train.recipe import Recipe
from mmcore.train.run import RunConfig

# how the names of a model's parts begin
VISION, PROJECTOR, NEWLINE, LANGUAGE = "visual.", "projector.", "image_newline", "language_model."


def _published(lr: float) -> OptimConfig:
    decays = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return OptimConfig(lr=lr, warmup=10**9, warmup_share=0.03, **decays)


@dataclass(frozen=True)
class LlavaRecipe(Recipe):
    """What both stages have in common."""

    data: ChatConfig = field(default_factory=ChatConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which conversations."""
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
        parts = [PROJECTOR, NEWLINE]
        if self.trainable != "projector" and self.adapters is None:
            parts.append(LANGUAGE)
        return (*parts, VISION) if self.trainable == "all" else tuple(parts)


@dataclass(frozen=True)
class LlavaStage1Config(LlavaRecipe):
    """Train LLaVA's projector between a frozen image tower and a frozen language model (arXiv 2310.03744, stage 1)."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1, batch_size=32))
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

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1, batch_size=16))
    optim: OptimConfig = field(default_factory=partial(_published, 2e-5))
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """What to start from: a run of mmcore train llava-stage1 or llava-stage2; a folder of transformers with a Llava or
    LlavaNext; or the original's mm_projector.bin, with --vision and --llm. A resumed run needs none."""
    vision: Path | None = None
    """The image tower, of a CLIP, where --from is a mm_projector.bin."""
    anyres: bool = False
    """Cut large images into tiles, as NeXT does, where --from is a mm_projector.bin."""
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
    lora_dropout: float = LORA_DROPOUT
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
        given = {VISION: self.vision_lr, PROJECTOR: self.projector_lr, NEWLINE: self.projector_lr}
        return {name: lr / self.optim.lr for name, lr in given.items() if lr is not None}
