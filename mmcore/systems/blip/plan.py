"""BLIP as a plan sees it."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmcore.systems.albef.plan import FusionPlan, tokens
from mmcore.systems.blip.model import BLIP, Kind
from mmcore.systems.blip.shapes import BLIP_CONFIGS


@dataclass(frozen=True)
class _Plan(FusionPlan):
    part: ClassVar[Kind]
    shapes = BLIP_CONFIGS

    def make(self, shape: Any) -> nn.Module:
        return BLIP(replace(shape, kind=self.part))


@dataclass(frozen=True)
class BlipRetrievalPlan(_Plan):
    """Plan a run of mmcore train blip-retrieval."""

    title = "BLIP's retrieval,"
    part = "retrieval"

    def read(self, model: Any, states: Tensor, is_many: bool) -> list[Tensor]:
        texts, many = tokens(len(states), self.max_text), tokens(3 * len(states), self.max_text)
        with torch.no_grad():
            model.pairs(states.detach(), *texts)
        pairs = model.pairs(states, *texts)
        more = states if is_many else states[:0]
        logits = model.match_read(pairs.keys_values, more, torch.empty(len(many[0]), dtype=torch.int64), *many)
        return [pairs.image, pairs.text, logits, *self.written(model, pairs, texts)]

    def written(self, model: Any, pairs: Any, texts: tuple[Tensor, Tensor]) -> list[Tensor]:
        return []


@dataclass(frozen=True)
class BlipPlan(BlipRetrievalPlan):
    """Plan a run of mmcore train blip."""

    title = "BLIP"
    part = "pretrain"

    def written(self, model: Any, pairs: Any, texts: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [model.captions(pairs.keys_values, *texts)[0]]


@dataclass(frozen=True)
class BlipCaptionPlan(_Plan):
    """Plan a run of mmcore train blip-caption."""

    title = "BLIP's captions,"
    part = "caption"
    has_momentum = False

    def read(self, model: Any, states: Tensor, is_many: bool) -> list[Tensor]:
        return [model.captions(states, *tokens(len(states), self.max_text))[0]]


@dataclass(frozen=True)
class BlipVqaPlan(_Plan):
    """Plan a run of mmcore train blip-vqa, of one answer a question."""

    max_answer: int = 10
    """Tokens of an answer, its first and last included."""

    title = "BLIP's answers,"
    part = "vqa"
    has_momentum = False

    def read(self, model: Any, states: Tensor, is_many: bool) -> list[Tensor]:
        asked, answers = tokens(len(states), self.max_text), tokens(len(states), self.max_answer)
        return [model.answers(states, *asked, torch.empty(len(states), dtype=torch.int64), *answers)]
