"""MoCo's recipe, of versions 1 and 2."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data import PairData
from mmcore.data.transforms import views
from mmcore.image_recipe import PATCH_MEAN
from mmcore.losses import global_ratio
from mmcore.nn import FeatureQueue
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step, VisionAssets
from mmcore.systems.moco.model import MoCoConfig, MoCoModel, queue_losses, random_keys
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.two_views import Taught
from mmcore.tasks.features import figure
from mmcore.tasks.projection import DEVIATION
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

_published = partial(OptimConfig, optimizer="sgd", lr=0.03, weight_decay=1e-4, warmup=0)


def _shape(vision: Any, is_tiny: bool) -> MoCoConfig:
    return MoCoConfig(vision, (256, 64) if is_tiny else (vision.width, 128))


@dataclass(frozen=True)
class MoCo(Taught):
    """Train MoCo v2 or v1 (arXiv 2003.04297, 1911.05722) on the images of any source: a view picks the key that a
    momentum encoder makes of another among a queue of earlier keys."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=200))
    optim: OptimConfig = field(default_factory=_published)
    teacher_momentum: float = 0.999
    """What of the momentum encoder stays at a step."""
    version: Literal[1, 2] = 2
    """2 = a head of two layers and views that are blurred; 1 = of one, and stronger changes of hue."""
    temperature: float | None = None
    """Temperature of the similarities; None = 0.2 of version 2, 0.07 of version 1."""
    queue_size: int = 65_536
    """Keys that are kept."""
    head_norm: bool = False
    """A BatchNorm over all ranks behind the head's hidden layer, with which a tower that has none learns faster; the
    published head has none, but its tower, a ResNet, is full of them."""

    shapes = shapes(_shape, "ViT-S-16", "ViT-B-16", "ViT-L-16")
    kind = MoCoModel
    ends_still = False

    @property
    def published_views(self) -> Sequence[views.View]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return views.MOCO_V2 if self.version == 2 else views.MOCO_V1

    def assets(self, data: PairData) -> VisionAssets:
        require("moco", self.queue_size >= 1, "--queue-size must be at least 1, got {}", self.queue_size)
        has_effect = self.version == 2 or not self.head_norm
        require(
            "moco", has_effect, "--head-norm has no effect with --version 1, which has no hidden layer, got {}", True
        )
        return super().assets(data)

    def shape(self) -> MoCoConfig:
        found = replace(super().shape(), head_norm=self.head_norm)
        return found if self.version == 2 else replace(found, projector=found.projector[-1:])

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        width = model.module.config.projector[-1]
        queue = FeatureQueue(self.queue_size, width)
        queue.enqueue(random_keys(self.queue_size, width, self.run.seed))
        return {**super().companions(model), "queue": queue.to(model.device)}

    def loss(self, model: Runner, batch: Tensor, step: Step) -> dict[str, Tensor]:
        temperature = self.temperature or {1: 0.07, 2: 0.2}[self.version]
        queries, keys = (F.normalize(x, dim=1) for x in (*model(batch[:, :1]), *self.taught(model, batch[:, 1:], step)))
        known, queue = keys, step.companions.get("queue")
        if isinstance(queue, FeatureQueue):  # a plan has none
            known = queue.filled
            queue.enqueue(keys, group=dist.group.WORLD if dist.is_initialized() else None)
        count = torch.tensor(len(queries), device=queries.device)
        losses = global_ratio(queue_losses(queries, keys, known, temperature).sum(), count)
        return {"loss": losses, "similarity of keys": global_ratio((queries * keys).sum().detach(), count)}


PROOF = Proof(
    [
        (
            "moco",
            "--data scattered --views source --batch-size 128 --steps 300 --queue-size 1024 --teacher-momentum 0.9 "
            "--head-norm --optimizer adamw --lr 2e-3 --weight-decay 0.05 --warmup 10",
        )
    ],
    [
        Claim(
            "linear probe accuracy of frozen features (held-out)",
            figure("linear probe accuracy", PATCH_MEAN),
            floor=0.53,
            ceiling=0.5,
            control="untrained",
        ),
        Claim("deviation of projections (held-out)", DEVIATION, 0.5, control=None),
    ],
)
