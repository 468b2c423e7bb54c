"""Masked image modelling as a plan sees it: what learns. What the targets come from is not counted."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.plan.demand import Built
from mmcore.plan.job import Job, MicroBatchPlan, Piece, Setting, numbers
from mmcore.systems.mim import shapes
from mmcore.systems.mim.model import Mim
from mmcore.systems.mim.vqkd import VqKdModel


@dataclass(frozen=True)
class _Plan(MicroBatchPlan):
    model: str = "tiny"
    """A shape by its name, as --model of mmcore train."""

    name: ClassVar[str]
    shapes: ClassVar[Any]
    kind: ClassVar[Any] = Mim

    def job(self) -> Job:
        known = ", ".join(self.shapes)
        require("plan", self.model in self.shapes, "--model must be one of {}, got {!r}", known, self.model)
        # counted whole, a model does not tell what one layer computes again
        is_plain = not self.activation_checkpointing
        require("plan", is_plain, "--activation-checkpointing must be left out for {}, got it", self.name)
        shape = self.shapes[self.model]
        with torch.device("meta"):
            learned, frozen, small = numbers(type(self).kind(shape))
        size = shape.vision.image_size
        side = size // shape.vision.patch_size
        # counted here: on fake tensors no number is known
        is_masked = self.kind is Mim
        masked = int(shape.mask.draw(side, np.random.default_rng(0)).sum()) if is_masked else 0
        piece = Piece("model", 1, partial(self._built, shape, masked), (1, 1))
        return Job(f"{self.name} {self.model}", (piece,), learned, 3 * size**2, frozen=frozen, small=small)

    def _built(self, shape: Any, count: int, _: int, num_samples: int, setting: Setting) -> Built:
        model = type(self).kind(shape)
        if self.kind is not Mim:
            model.eval()  # a codebook that learns looks at numbers
        size, side = shape.vision.image_size, shape.vision.image_size // shape.vision.patch_size
        images = torch.empty(num_samples, 3, size, size, dtype=torch.uint8)

        def forward() -> list[Tensor]:
            if self.kind is not Mim:
                return list(model(images)[:2])
            masked = torch.empty(num_samples, side**2, dtype=torch.bool)
            return model(images, masked, torch.empty(num_samples * count, dtype=torch.int64))[0]

        return Built(model.parameters(), forward)


@dataclass(frozen=True)
class SimMimPlan(_Plan):
    """Plan a run of mmcore train simmim."""

    name = "SimMIM"
    shapes = shapes.SIMMIM


@dataclass(frozen=True)
class MaskFeatPlan(_Plan):
    """Plan a run of mmcore train maskfeat."""

    name = "MaskFeat"
    shapes = shapes.MASKFEAT


@dataclass(frozen=True)
class BeitPlan(_Plan):
    """Plan a run of mmcore train beit."""

    name = "BEiT"
    shapes = shapes.BEIT


@dataclass(frozen=True)
class Beit2Plan(_Plan):
    """Plan a run of mmcore train beit2."""

    name = "BEiT v2"
    shapes = shapes.BEIT2


@dataclass(frozen=True)
class MvpPlan(_Plan):
    """Plan a run of mmcore train mvp."""

    name = "MVP"
    shapes = shapes.MVP


@dataclass(frozen=True)
class EvaPlan(_Plan):
    """Plan a run of mmcore train eva."""

    name = "EVA"
    shapes = shapes.EVA


@dataclass(frozen=True)
class Data2VecPlan(_Plan):
    """Plan a run of mmcore train data2vec."""

    name = "data2vec"
    shapes = shapes.DATA2VEC


@dataclass(frozen=True)
class VqKdPlan(_Plan):
    """Plan a run of mmcore train vqkd."""

    name = "VQ-KD"
    shapes = shapes.VQKD
    kind = VqKdModel
