"""SimCLR's recipe."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmcore.data.transforms import views
from mmcore.image_recipe import PATCH_MEAN
from mmcore.losses import nt_xent_loss
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.simclr.model import SimCLRModel
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.two_views import TwoViewConfig, TwoViews
from mmcore.tasks.features import figure
from mmcore.tasks.projection import DEVIATION
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

# lr 0.3 a 256 of the batch of 4,096; LARS
_published = partial(OptimConfig, optimizer="lars", lr=4.8, weight_decay=1e-6, warmup=3_130)


def _shape(vision: Any, is_tiny: bool) -> TwoViewConfig:
    return TwoViewConfig(vision, (256, 64) if is_tiny else (2048, 128))


@dataclass(frozen=True)
class SimCLR(TwoViews):
    """Train SimCLR (arXiv 2002.05709) on the images of any source: two views of each pick each other."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1000))
    optim: OptimConfig = field(default_factory=_published)
    temperature: float = 0.1
    """Temperature of the similarities."""

    shapes = shapes(_shape, "ViT-S-16", "ViT-B-16", "ViT-L-16")
    kind = SimCLRModel
    published_views = views.SIMCLR

    def loss(self, model: Runner, batch: Tensor, step: Step) -> dict[str, Tensor]:
        first, second = (F.normalize(x, dim=1) for x in model(batch))
        return {"loss": nt_xent_loss(first, second, self.temperature)}


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
        Claim("deviation of projections (held-out)", DEVIATION, 0.5, control=None),
    ],
)
