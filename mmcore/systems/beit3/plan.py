"""BEiT-3 as a plan sees it. What codes come from is not counted."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.plan import pieces
from mmcore.plan.demand import Built
from mmcore.plan.job import Exchange, Job, Piece, PlanConfig, Setting, numbers
from mmcore.systems.beit3.model import BEiT3, Beit3Config, Head
from mmcore.systems.beit3.shapes import BEIT3_CONFIGS


@dataclass(frozen=True)
class Beit3Plan(PlanConfig):
    """Plan a run of mmcore train beit3."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward."""
    model: str = "base"
    """A shape by its name, as --model of mmcore train."""
    max_text: int = 64
    """Tokens of a text, [CLS] and [SEP] included."""

    title: ClassVar[str] = "BEiT-3"
    head: ClassVar[Head] = "pretraining"

    def job(self) -> Job:
        known = ", ".join(BEIT3_CONFIGS)
        require("plan", self.model in BEIT3_CONFIGS, "--model must be one of {}, got {!r}", known, self.model)
        shape = BEIT3_CONFIGS[self.model]
        fits = 2 <= self.max_text <= shape.num_text
        require("plan", fits, "--max-text must be from 2 to {}, got {}", shape.num_text, self.max_text)
        shape = replace(shape, head=self.head, num_answers=getattr(self, "answers", 0))
        vision = shape.vision
        with torch.device("meta"):
            of_model = numbers(BEiT3(shape))
        piece = Piece("transformer", vision.num_layers, partial(self._built, shape), (1, 2))
        return Job(
            f"{self.title} {self.model}",
            (piece,),
            of_model.trained,
            pieces.image_bytes(vision) + 4 * 8 * self.max_text,
            frozen=of_model.frozen,
            small=of_model.small,
            exchange=Exchange(vision.width) if self.head == "retrieval" else None,
            levers=("activation_checkpointing", "zero"),
        )

    def _built(self, shape: Beit3Config, num_layers: int, samples: int, setting: Setting) -> Built:
        model = BEiT3(replace(shape, vision=replace(shape.vision, num_layers=num_layers))).train()
        model.activation_checkpointing = setting.activation_checkpointing
        size = shape.vision.image_size
        images = torch.empty(samples, 3, size, size, dtype=torch.uint8)
        tokens = torch.empty(samples, self.max_text, dtype=torch.int64)
        num_text = torch.empty(samples, dtype=torch.int64)
        return Built(model.parameters(), lambda: self.forward(model, images, tokens, num_text))

    def forward(self, model: Any, images: Tensor, tokens: Tensor, num_text: Tensor) -> list[Tensor]:
        """What is learned."""
        masked = torch.empty(len(images), model.config.vision.num_patches, dtype=torch.bool)
        model.coder = lambda _: torch.empty(masked.shape, dtype=torch.int64)
        return list(model.pretrain(images, masked, num_text, tokens, tokens, tokens, tokens))


@dataclass(frozen=True)
class Beit3RetrievalPlan(Beit3Plan):
    """Plan a run of mmcore train beit3-retrieval."""

    title = "BEiT-3's retrieval,"
    head = "retrieval"

    def forward(self, model: Any, images: Tensor, tokens: Tensor, num_text: Tensor) -> list[Tensor]:
        return list(model.pairs(images, tokens, num_text)[:2])


@dataclass(frozen=True)
class Beit3CaptionPlan(Beit3Plan):
    """Plan a run of mmcore train beit3-caption."""

    title = "BEiT-3's captions,"
    head = "captioning"

    def forward(self, model: Any, images: Tensor, tokens: Tensor, num_text: Tensor) -> list[Tensor]:
        return [model.learn_captions(images, tokens, num_text, tokens)]


@dataclass(frozen=True)
class Beit3VqaPlan(Beit3Plan):
    """Plan a run of mmcore train beit3-vqa."""

    answers: int = 3129
    """Answers of the classifier."""

    title = "BEiT-3's answers,"
    head = "answers"

    def forward(self, model: Any, images: Tensor, tokens: Tensor, num_text: Tensor) -> list[Tensor]:
        return [model.answer(images, tokens, num_text)]
