"""VLMo as a plan sees it."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.plan import pieces
from mmcore.plan.demand import Built
from mmcore.plan.job import Exchange, Job, Piece, PlanConfig, Setting, numbers
from mmcore.systems.vlmo.model import VLMo, VlmoConfig
from mmcore.systems.vlmo.recipe import VlmoText
from mmcore.systems.vlmo.shapes import VLMO_CONFIGS


def _texts(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, length, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)


@dataclass(frozen=True)
class VlmoPlan(PlanConfig):
    """Plan a run of mmcore train vlmo."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward."""
    model: str = "base"
    """A shape by its name, as --model of mmcore train."""
    max_text: int = 40
    """Tokens of a text, [CLS] and [SEP] included."""

    title: ClassVar[str] = "VLMo"
    num_answers: ClassVar[int] = 0
    has_images: ClassVar[bool] = True

    def make(self, shape: VlmoConfig) -> VLMo:
        return VLMo(shape)

    def job(self) -> Job:
        known = ", ".join(VLMO_CONFIGS)
        require("plan", self.model in VLMO_CONFIGS, "--model must be one of {}, got {!r}", known, self.model)
        shape = VLMO_CONFIGS[self.model]
        most = 196 if shape.vision.positions == "none" else 1024
        fits = 2 <= self.max_text <= most
        require("plan", fits, "--max-text must be from 2 to {}, got {}", most, self.max_text)
        shape = replace(shape, num_text=self.max_text, num_answers=getattr(self, "answers", 0))
        if shape.vision.relative_positions != "none":
            shape = replace(shape, num_distances=max(shape.num_distances, self.max_text))
        vision = shape.vision
        with torch.device("meta"):
            of_model = numbers(self.make(shape))

        def build(num_layers: int, samples: int, setting: Setting) -> Built:
            layers = num_layers + shape.num_joint
            model = self.make(replace(shape, vision=replace(vision, num_layers=layers))).train()
            model.activation_checkpointing = setting.activation_checkpointing
            images = torch.empty(samples, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
            return Built(model.parameters(), lambda: self.forward(model, images, setting.gpus > 1))

        piece = Piece("transformer", vision.num_layers - shape.num_joint, build, (1, 2))
        is_pairs = self.title == "VLMo"
        return Job(
            f"{self.title} {self.model}",
            (piece,),
            of_model.trained,
            (pieces.image_bytes(vision) if self.has_images else 0) + 3 * 8 * self.max_text,
            frozen=of_model.frozen,
            small=of_model.small,
            exchange=Exchange(vision.width, has_hard_negatives=True) if is_pairs else None,
            levers=("activation_checkpointing", "zero"),
        )

    def forward(self, model: Any, images: Tensor, is_many: bool) -> list[Tensor]:
        """What is learned of images, on several ranks or one."""
        samples = len(images)
        tokens, num_text = _texts(samples, self.max_text)
        found = model.pairs(images, tokens, num_text)
        index = torch.empty(3 * samples, dtype=torch.int64)
        seen = images.repeat(2, 1, 1, 1) if is_many else images
        logits = model.match(seen, index, *_texts(3 * samples, self.max_text))
        return [*found[:4], logits, model.word_loss(images, tokens, num_text, tokens)]


@dataclass(frozen=True)
class VlmoTextPlan(VlmoPlan):
    """Plan a run of mmcore train vlmo-text."""

    max_text: int = 196
    """Tokens of a text, [CLS] and [SEP] included."""
    freeze: bool = True
    """Keep all that images go through as it is."""

    title = "VLMo's texts,"
    has_images = False

    def make(self, shape: VlmoConfig) -> VLMo:
        model, recipe = VLMo(shape), VlmoText(freeze=self.freeze)
        for name, p in model.named_parameters():
            p.requires_grad_(recipe.learns(name))
        return model

    def forward(self, model: Any, images: Tensor, is_many: bool) -> list[Tensor]:
        tokens, num_text = _texts(len(images), self.max_text)
        return [model.word_loss(None, tokens, num_text, tokens)]


@dataclass(frozen=True)
class VlmoVqaPlan(VlmoPlan):
    """Plan a run of mmcore train vlmo-vqa."""

    answers: int = 3129
    """Answers of the classifier."""

    title = "VLMo's answers,"

    def forward(self, model: Any, images: Tensor, is_many: bool) -> list[Tensor]:
        return [model.answer(images, *_texts(len(images), self.max_text))]
