"""A recipe with all that a run may have to keep: BatchNorm over ranks, a queue, a momentum teacher, a centre."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data import Preprocess
from mmcore.data.collate import PairSample, collate_pairs
from mmcore.losses import global_ratio
from mmcore.nn import BatchNorm, FeatureQueue, MomentumEncoder
from mmcore.recipe import Assets, OnPairs, Step


class Encoder(nn.Module):
    """Images of 16 pixels to [B, 8] of unit norm."""

    def __init__(self, queue_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), BatchNorm(8), nn.Linear(8, 8))
        self.register_buffer("centre", torch.zeros(queue_size))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.body(images), dim=-1)


@dataclass(frozen=True)
class ToyAssets(Assets):
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(16))

    def save(self, folder: Path) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Toy(OnPairs):
    """MoCo's step in small."""

    queue_size: int = 32
    """Features that are kept."""

    def assets(self, data: Any) -> ToyAssets:
        return ToyAssets()

    def load_assets(self, folder: Path, saved: Any, frozen: Any, purpose: Any) -> ToyAssets:
        return ToyAssets()

    def build(self, assets: ToyAssets) -> Encoder:
        return Encoder(self.queue_size)

    def collate(self, assets: ToyAssets, samples: list[PairSample]) -> Tensor:
        return collate_pairs(samples).images / 255

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        return {"teacher": MomentumEncoder(model.deepspeed, 0.9), "queue": FeatureQueue(self.queue_size, 8)}

    def loss(self, model: Any, batch: Tensor, step: Step) -> dict[str, Tensor]:
        teacher, queue = step.companions["teacher"], step.companions["queue"]
        assert isinstance(queue, FeatureQueue)
        query, key = model(batch), teacher(batch)
        known = queue.filled
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ known.T], 1) / 0.5
        queue.enqueue(key, group=dist.group.WORLD)
        each = -logits.log_softmax(1)[:, 0]
        return {"loss": global_ratio(each.sum(), torch.tensor(len(each)))}

    def after_step(self, model: Any, step: Step) -> None:
        teacher = step.companions["teacher"]
        assert isinstance(teacher, MomentumEncoder)
        teacher.update()
        model.module.centre.mul_(0.5).add_(step.number)
