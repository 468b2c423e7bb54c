"""The recipe of BEiT v2's tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.transforms import views
from mmcore.losses import global_ratio
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.mim import shapes
from mmcore.systems.mim.sources import MimAssets, WithTeacher, resized
from mmcore.systems.mim.targets import LOSSES
from mmcore.systems.mim.vqkd import VqKdConfig, VqKdModel
from mmcore.systems.mim.weights import save_tower
from mmcore.tasks.projection import USED
from mmcore.tasks.reconstruction import OVER_MEAN, Reconstructs
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

_published = partial(OptimConfig, lr=2e-4, beta2=0.99, eps=1e-8, weight_decay=1e-4, min_lr=1e-5, warmup=6_250)


@dataclass(frozen=True)
class VqKd(WithTeacher):
    """Train BEiT v2's tokenizer, VQ-KD (arXiv 2208.06366), on the images of any source: a teacher's features are
    predicted from codes."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=100))
    optim: OptimConfig = field(default_factory=_published)
    num_tokens: int | None = None
    """Codes; None = as --model has it."""

    shapes = shapes.VQKD
    kind = VqKdModel
    published_views = views.MAE
    pool = "mean"
    tasks = ("reconstruction", "projection")
    training_only = ("narrow.", "codebook.", "decoder", "head.")
    accumulates = False  # codes are moved in the forward

    def shape(self) -> VqKdConfig:
        shape: VqKdConfig = self.shapes[self.model]
        if self.num_tokens is None:
            return shape
        require("vqkd", self.num_tokens >= 2, "--num-tokens must be at least 2, got {}", self.num_tokens)
        return replace(shape, num_tokens=self.num_tokens)

    def build(self, assets: MimAssets) -> VqKdModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        model = super().build(assets)
        model.decoder.activation_checkpointing = self.activation_checkpointing
        model.targets = partial(_taught, assets)
        return model

    def sample(self, assets: MimAssets, record: Any, rng: np.random.Generator) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.both_views(assets, record, rng)

    def collate(self, assets: MimAssets, samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Images, and as the teacher wants them, where that differs."""
        return tuple(torch.stack(x) for x in zip(*samples, strict=True))

    def loss(self, model: Runner, batch: tuple[Tensor, ...], step: Step) -> dict[str, Tensor]:
        predicted, distance, index, target = model(*batch)
        count = torch.tensor(index.numel(), device=index.device)
        cosines = LOSSES["cosine"](predicted.flatten(0, 1), target.flatten(0, 1))
        of_features = global_ratio((1 + cosines).sum(), count)
        of_codes = global_ratio(distance * count, count)
        return {"loss": of_features + of_codes, "features": of_features, "codes": of_codes}

    def reconstructs(self, assets: MimAssets, model: Runner, device: torch.device) -> Reconstructs:
        """All patches: nothing is masked."""
        num = assets.shape.vision.num_patches

        def target(images: Tensor) -> Tensor:
            return _taught(assets, resized(images, assets.seen.size))

        def predict(images: Tensor, mask: Tensor) -> Tensor:
            return model(images)[0]

        def mask(rng: np.random.Generator) -> Tensor:
            return torch.ones(num, dtype=torch.bool)

        return Reconstructs(assets.preprocess, mask, target, predict, score="cosine")

    def projects(self, assets: MimAssets, model: Runner, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Which code each patch has, [B * P, V]."""
        return lambda images: F.one_hot(model(images)[2].flatten(), assets.shape.num_tokens)

    def export(self, assets: MimAssets, model: VqKdModel, folder: Path, format: str) -> None:
        save_tower(self.image_tower(assets, model), folder)


def _taught(assets: MimAssets, images: Tensor) -> Tensor:
    return assets.made(images.device)(images)


_CLIP = ("clip", "--data digits --model tiny --lr 1e-3 --epochs 30")
VQKD_FLAGS = (
    "--data digits --views source --teacher {0} --batch-size 128 --steps 200 --lr 2e-3 --warmup 20 --weight-decay 1e-4"
)
PROOF = Proof(
    [_CLIP, ("vqkd", VQKD_FLAGS)],
    [
        Claim("codes used (held-out)", USED, 20.5 / 32, ceiling=0.2, control="untrained"),
        Claim("cosine above each place's mean feature (held-out)", OVER_MEAN, 0.1, ceiling=0.0),
    ],
)
