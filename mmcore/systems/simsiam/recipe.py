"""SimSiam's recipe."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.transforms import views
from mmcore.losses import global_ratio
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.simsiam.model import SimSiamModel
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.two_views import TwoViewConfig, TwoViews
from mmcore.tasks.projection import DEVIATION
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig, Rule

# lr 0.05 a 256 of the batch of 512
_published = partial(OptimConfig, optimizer="sgd", lr=0.1, weight_decay=1e-4, warmup=0)


def _shape(vision: Any, is_tiny: bool) -> TwoViewConfig:
    wide, narrow = (256, 64) if is_tiny else (2048, 512)
    return TwoViewConfig(vision, (wide, wide, wide), (narrow, wide))


@dataclass(frozen=True)
class SimSiam(TwoViews):
    """Train SimSiam (arXiv 2011.10566) on the images of any source: each of two views predicts the other, through which
    no gradient goes."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=100))
    optim: OptimConfig = field(default_factory=_published)
    stop_gradient: bool = True
    """False lets the gradient through the predicted view too, with which the head collapses: a control."""

    shapes = shapes(_shape, "ViT-S-16", "ViT-B-16", "ViT-L-16")
    kind = SimSiamModel
    published_views = views.MOCO_V2

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("predictor.", fixed_lr=True),)

    def loss(self, model: Runner, batch: Tensor, step: Step) -> dict[str, Tensor]:
        *predicted, first, second = model(batch)
        targets = [x.detach() if self.stop_gradient else x for x in (second, first)]
        cosines = [F.cosine_similarity(p, z) for p, z in zip(predicted, targets, strict=True)]
        return {"loss": global_ratio(-torch.stack(cosines).mean(0).sum(), torch.tensor(len(batch)).to(batch.device))}


_FLAGS = (
    "--data scattered --views source --batch-size 128 --steps 150 --optimizer adamw --lr 2e-3 --weight-decay 0.05 "
    "--warmup 10"
)
PROOF = Proof(
    [("simsiam", _FLAGS)],
    [Claim("deviation of projections (held-out)", DEVIATION, floor=0.8, ceiling=0.75, control="without")],
    without=[("simsiam", f"{_FLAGS} --no-stop-gradient")],
)
