"""Masked image modelling as a plan sees it: what learns. What the targets come from is not counted."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmcore.nn import Transformer
from mmcore.ops import require
from mmcore.plan.demand import Built
from mmcore.plan.job import Job, Lever, Piece, PlanConfig, Setting, numbers
from mmcore.systems.mim import shapes
from mmcore.systems.mim.model import Mim
from mmcore.systems.mim.vqkd import VqKdModel


@dataclass(frozen=True)
class _Plan(PlanConfig):
    activation_checkpointing: bool = False
    """Recompute activations in the backward."""
    model: str = "tiny"
    """A shape by its name, as --model of mmcore train."""

    name: ClassVar[str]
    shapes: ClassVar[Any]
    levers: ClassVar[tuple[Lever, ...]] = ("activation_checkpointing", "zero")

    def job(self) -> Job:
        known = ", ".join(self.shapes)
        require("plan", self.model in self.shapes, "--model must be one of {}, got {!r}", known, self.model)
        shape = self.shapes[self.model]
        with torch.device("meta"):
            learned, frozen, small = numbers(self._model(shape))
        piece = Piece("model", shape.vision.num_layers, partial(self._built, shape), (1, 2))
        size = 3 * shape.vision.image_size**2
        return Job(f"{self.name} {self.model}", (piece,), learned, size, frozen=frozen, small=small, levers=self.levers)

    def _model(self, shape: Any) -> Any:
        raise NotImplementedError

    def _forward(self, model: Any, shape: Any, images: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def _built(self, shape: Any, num_layers: int, num_samples: int, setting: Setting) -> Built:
        model = self._model(_shallow(shape, num_layers))
        for part in (x for x in model.modules() if isinstance(x, Transformer)):
            part.activation_checkpointing = setting.activation_checkpointing
        images = torch.empty(num_samples, 3, *[shape.vision.image_size] * 2, dtype=torch.uint8)
        return Built(model.parameters(), lambda: self._forward(model, shape, images))


def _shallow(shape: Any, num_layers: int) -> Any:
    """With so many layers in the tower, of which later parts read no more than there are."""
    changes: dict[str, Any] = {"vision": replace(shape.vision, num_layers=num_layers)}
    for name in ("class_from", "average_top"):
        if hasattr(shape, name):
            changes[name] = min(getattr(shape, name), num_layers)
    return replace(shape, **changes)


@dataclass(frozen=True)
class _MimPlan(_Plan):
    accum: int = 1
    """Micro-batches a step."""

    levers = ("accum", "activation_checkpointing", "zero")

    def _model(self, shape: Any) -> Any:
        return Mim(shape)

    def _forward(self, model: Any, shape: Any, images: Tensor) -> list[Tensor]:
        side = shape.vision.image_size // shape.vision.patch_size
        masked = torch.empty(len(images), side**2, dtype=torch.bool)
        count = int(shape.mask.grid(side, np.random.default_rng(0)).sum()) * len(images)
        return model(images, masked, torch.empty(count, dtype=torch.int64))[0]


@dataclass(frozen=True)
class SimMimPlan(_MimPlan):
    """Plan a run of mmcore train simmim."""

    name = "SimMIM"
    shapes = shapes.SIMMIM


@dataclass(frozen=True)
class MaskFeatPlan(_MimPlan):
    """Plan a run of mmcore train maskfeat."""

    name = "MaskFeat"
    shapes = shapes.MASKFEAT


@dataclass(frozen=True)
class BeitPlan(_MimPlan):
    """Plan a run of mmcore train beit."""

    name = "BEiT"
    shapes = shapes.BEIT


@dataclass(frozen=True)
class Beit2Plan(_MimPlan):
    """Plan a run of mmcore train beit2."""

    name = "BEiT v2"
    shapes = shapes.BEIT2


@dataclass(frozen=True)
class MvpPlan(_MimPlan):
    """Plan a run of mmcore train mvp."""

    name = "MVP"
    shapes = shapes.MVP


@dataclass(frozen=True)
class EvaPlan(_MimPlan):
    """Plan a run of mmcore train eva."""

    name = "EVA"
    shapes = shapes.EVA


@dataclass(frozen=True)
class Data2VecPlan(_MimPlan):
    """Plan a run of mmcore train data2vec."""

    name = "data2vec"
    shapes = shapes.DATA2VEC


@dataclass(frozen=True)
class VqKdPlan(_Plan):
    """Plan a run of mmcore train vqkd."""

    name = "VQ-KD"
    shapes = shapes.VQKD

    def _model(self, shape: Any) -> Any:
        return VqKdModel(shape).eval()  # a codebook that learns looks at numbers

    def _forward(self, model: Any, shape: Any, images: Tensor) -> list[Tensor]:
        return list(model(images)[:2])
