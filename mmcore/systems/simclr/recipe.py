"""SimCLR's recipe."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.transforms import views
from mmcore.image_recipe import PATCH_MEAN, ImageRecipe
from mmcore.losses import nt_xent_loss
from mmcore.ops import require
from mmcore.parts.heads import check_batch
from mmcore.recipe import Claim, Proof, Runner, Step, VisionAssets
from mmcore.systems.simclr.model import SimCLRConfig, SimCLRModel
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.weights import save_vit
from mmcore.tasks.features import figure
from mmcore.tasks.projection import DEVIATION
from mmcore.train.optim import OptimConfig

# lr 0.3 a 256 of the batch of 4,096; LARS
_published = partial(OptimConfig, optimizer="lars", lr=4.8, weight_decay=1e-6, warmup=3_130)


def _shape(vision: Any, is_tiny: bool) -> SimCLRConfig:
    return SimCLRConfig(vision, 256, 64) if is_tiny else SimCLRConfig(vision)


@dataclass(frozen=True)
class SimCLR(ImageRecipe):
    """Train SimCLR (arXiv 2002.05709) on the images of any source: two views of each pick each other."""

    optim: OptimConfig = field(default_factory=_published)
    temperature: float = 0.1
    """Temperature of the similarities."""

    shapes = shapes(_shape, "ViT-S-16", "ViT-B-16", "ViT-L-16")
    kind = SimCLRModel
    published_views = views.SIMCLR
    pool = "mean"
    tasks = ("features", "projection")
    training_only = ("projector.",)
    accumulates = False  # the statistics of BatchNorm are of the whole batch

    def assets(self, data: PairData) -> VisionAssets:
        check_batch("simclr", self.run.batch_size)
        require("simclr", self.temperature > 0, "--temperature must be above 0, got {}", self.temperature)
        return super().assets(data)

    def sample(self, assets: VisionAssets, record: Any, rng: np.random.Generator) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.all_views(record, assets.preprocess, rng)

    def collate(self, assets: VisionAssets, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples)

    def loss(self, model: Runner, batch: Tensor, step: Step) -> dict[str, Tensor]:
        return {"loss": nt_xent_loss(*model(batch), self.temperature)}

    def projects(self, assets: VisionAssets, model: Runner, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images[:, None])[0]

    def export(self, assets: VisionAssets, model: SimCLRModel, folder: Any, format: str) -> None:
        save_vit(self.image_tower(assets, model), folder)


PROOF = Proof(
    [
        (
            "simclr",
            "--data scattered --views source --batch-size 256 --steps 150 --temperature 0.2 "
            "--optimizer adamw --lr 2e-3 --weight-decay 0.05 --warmup 10",
        )
    ],
    [
        Claim(
            "k-NN accuracy of frozen features (held-out)",
            figure("k-NN accuracy", PATCH_MEAN),
            floor=0.58,
            ceiling=0.52,
            control="untrained",
        ),
        Claim("deviation of projections (held-out)", DEVIATION, 0.5, 1.1),  # other images deviate as much
    ],
)
