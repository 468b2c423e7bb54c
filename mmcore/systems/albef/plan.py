"""ALBEF as a plan sees it."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmcore.ops import require
from mmcore.plan import pieces
from mmcore.plan.demand import Built
from mmcore.plan.job import Exchange, Job, Piece, PlanConfig, Setting, numbers
from mmcore.systems.albef.model import ALBEF
from mmcore.systems.albef.shapes import ALBEF_CONFIGS
from mmcore.systems.albef.vqa import ALBEFVQA

MASKED = 0.15


def tokens(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, length, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)


@dataclass(frozen=True)
class FusionPlan(PlanConfig):
    """An image tower and what reads it, counted whole; a momentum model is there as weights that do not learn, and as
    a second forward."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward."""
    model: str = "base"
    """A shape by its name, as --model of mmcore train."""
    max_text: int = 30
    """Tokens of a text, [CLS] and [SEP] included."""

    title: ClassVar[str]
    shapes: ClassVar[Any] = ALBEF_CONFIGS
    has_momentum: ClassVar[bool] = True

    def make(self, shape: Any) -> nn.Module:
        """The model of a shape."""
        raise NotImplementedError

    def read(self, model: Any, states: Tensor, is_many: bool) -> list[Tensor]:
        """What is learned of states [B, P, D] of images, on several ranks or one."""
        raise NotImplementedError

    def job(self) -> Job:
        known = ", ".join(self.shapes)
        require("plan", self.model in self.shapes, "--model must be one of {}, got {!r}", known, self.model)
        shape = self.shapes[self.model]
        vision = shape.vision
        with torch.device("meta"):
            of_model = numbers(self.make(shape))

        def build(_: int, samples: int, setting: Setting) -> Built:
            model: Any = self.make(replace(shape, vision=replace(vision, num_layers=1)))
            for module in model.modules():
                if hasattr(module, "activation_checkpointing"):
                    module.activation_checkpointing = setting.activation_checkpointing
            states = torch.empty(samples, vision.num_tokens, vision.width, requires_grad=True)
            weights = [x for name, x in model.named_parameters() if not name.startswith("visual.")]
            return Built(weights, lambda: self.read(model.train(), states, setting.gpus > 1))

        frozen = of_model.trained if self.has_momentum else 0
        parts = (pieces.tower_piece(vision, learns=True), Piece("text and fusion", 1, build, (1, 1)))
        exchange = Exchange(shape.embed_dim, has_hard_negatives=True) if self.has_momentum else None
        return Job(
            f"{self.title} {self.model}",
            parts,
            of_model.trained,
            pieces.image_bytes(vision) + 8 * self.max_text,
            frozen=frozen,
            small=of_model.small,
            exchange=exchange,
            levers=("activation_checkpointing", "zero"),
        )


@dataclass(frozen=True)
class AlbefPlan(FusionPlan):
    """Plan a run of mmcore train albef."""

    title = "ALBEF"

    def make(self, shape: Any) -> nn.Module:
        return ALBEF(shape)

    def read(self, model: Any, states: Tensor, is_many: bool) -> list[Tensor]:
        samples = len(states)
        texts = tokens(samples, self.max_text)
        with torch.no_grad():
            momentum = model.pairs(states.detach(), *texts)
            x = model.text(texts[0], None, momentum.keys_values)
        pairs = model.pairs(states, *texts)
        index = torch.empty(3 * samples, dtype=torch.int64)
        more = states if is_many else states[:0]
        _, num_text = tokens(3 * samples, self.max_text)
        logits = model.match_read(pairs.keys_values, more, index, pairs.words.repeat(3, 1, 1), num_text)
        x = model.text(texts[0], None, pairs.keys_values)
        hidden = max(1, round(MASKED * self.max_text))
        return [pairs.image, pairs.text, logits, model.text_head(x[:, :hidden])]


@dataclass(frozen=True)
class AlbefVqaPlan(FusionPlan):
    """Plan a run of mmcore train albef-vqa, of one answer a question."""

    max_answer: int = 10
    """Tokens of an answer, its first and last included."""

    title = "ALBEF's answers,"
    has_momentum = False

    def make(self, shape: Any) -> nn.Module:
        return ALBEFVQA(shape)

    def read(self, model: Any, states: Tensor, is_many: bool) -> list[Tensor]:
        asked, answers = tokens(len(states), self.max_text), tokens(len(states), self.max_answer)
        index = torch.empty(len(states), dtype=torch.int64)
        return [model.answers(states, *asked, index, *answers)]
