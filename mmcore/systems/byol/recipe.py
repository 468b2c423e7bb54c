"""BYOL's recipe."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.transforms import views
from mmcore.image_recipe import PATCH_MEAN
from mmcore.losses import global_ratio
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.byol.model import BYOLModel
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.two_views import Taught, TwoViewConfig
from mmcore.tasks.features import figure
from mmcore.tasks.projection import DEVIATION
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

# lr 0.2 a 256 of the batch of 4,096; LARS
_published = partial(OptimConfig, optimizer="lars", lr=3.2, weight_decay=1.5e-6, warmup=3_130)


def _shape(vision: Any, is_tiny: bool) -> TwoViewConfig:
    widths = (256, 64) if is_tiny else (4096, 256)
    return TwoViewConfig(vision, widths, widths)


@dataclass(frozen=True)
class BYOL(Taught):
    """Train BYOL (arXiv 2006.07733) on the images of any source: each of two views predicts what a moving average of
    the model makes of the other, without negatives."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1000))
    optim: OptimConfig = field(default_factory=_published)
    teacher_momentum: float = 0.996
    """What of the moving average stays at the first step; rises to 1 along a cosine."""

    shapes = shapes(_shape, "ViT-S-16", "ViT-B-16", "ViT-L-16")
    kind = BYOLModel
    published_views = views.BYOL

    def loss(self, model: Runner, batch: Tensor, step: Step) -> dict[str, Tensor]:
        predicted, targets = model(batch)[:2], self.taught(model, batch, step)
        cosines = [F.cosine_similarity(p, z) for p, z in zip(predicted, targets[::-1], strict=True)]
        count = torch.tensor(len(batch)).to(batch.device)
        return {"loss": global_ratio((4 - 2 * torch.stack(cosines).sum(0)).sum(), count)}


PROOF = Proof(
    [
        (
            "byol",
            "--data scattered --views source --batch-size 256 --steps 200 --teacher-momentum 0.98 --optimizer adamw "
            "--lr 3e-3 --weight-decay 0.05 --warmup 10",
        )
    ],
    [
        Claim(
            "linear probe accuracy of frozen features (held-out)",
            figure("linear probe accuracy", PATCH_MEAN),
            floor=0.52,
            ceiling=0.5,
            control="untrained",
        ),
        Claim("deviation of projections (held-out)", DEVIATION, 0.5, control=None),
    ],
)
