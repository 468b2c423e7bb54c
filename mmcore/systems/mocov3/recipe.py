"""MoCo v3's recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.transforms import views
from mmcore.image_recipe import CLASS_TOKEN
from mmcore.ops import require
from mmcore.parts.vit import Tower
from mmcore.recipe import Claim, Proof, Runner, Step, VisionAssets
from mmcore.runs import load_weights
from mmcore.settings import free
from mmcore.systems.mocov3.model import PATCHES, MoCoV3Model, contrast, random_patches
from mmcore.systems.mocov3.weights import load_mocov3
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.two_views import Taught, TwoViewConfig
from mmcore.tasks.features import figure
from mmcore.tasks.projection import DEVIATION
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

# lr 1.5e-4 a 256 of the batch of 4,096; 40 of 300 epochs of warm-up
_published = partial(OptimConfig, lr=2.4e-3, beta2=0.999, eps=1e-8, weight_decay=0.1, warmup=12_500, warmup_share=0.14)


def _shape(vision: Any, is_tiny: bool) -> TwoViewConfig:
    if is_tiny:
        return TwoViewConfig(vision, (256, 256, 64), (256, 64))
    return TwoViewConfig(replace(vision, num_heads=12), (4096, 4096, 256), (4096, 256))


@dataclass(frozen=True)
class MoCoV3(Taught):
    """Train MoCo v3 (arXiv 2104.02057) on the images of any source: each of two views picks the key that a momentum
    encoder makes of the other among those of the batch."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=300))
    optim: OptimConfig = field(default_factory=_published)
    teacher_momentum: float = 0.99
    """What of the momentum encoder stays at the first step; rises to 1 along a cosine."""
    temperature: float = 0.2
    """Temperature of the similarities."""
    init: Path | None = field(default=None, metadata=free)
    """A published file, such as vit-s-300ep.pth.tar, whose shape and weights the run starts from; None = random
    weights."""

    shapes = shapes(_shape, "ViT-S-16", "ViT-B-16", positions="sincos")
    kind = MoCoV3Model
    published_views = views.BYOL
    pool = "class"

    def assets(self, data: PairData) -> VisionAssets:
        assets = super().assets(data)
        if self.init is None:
            return replace(assets, frozen=random_patches(assets.shape.vision, self.run.seed))
        require("mocov3", self.model == "tiny", "--model has no effect with --init, got {!r}", self.model)
        model = load_mocov3(self.init)
        return VisionAssets(model.config, frozen={name: model.get_parameter(name).detach() for name in PATCHES})

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> VisionAssets:
        return replace(super().load_assets(folder, saved, frozen, purpose), frozen=frozen)

    def build(self, assets: VisionAssets) -> MoCoV3Model:
        model = super().build(assets)
        load_weights(model, assets.frozen, is_whole=False)
        return model

    def initial(self, assets: VisionAssets, model: MoCoV3Model) -> Mapping[str, Tensor]:
        return {} if self.init is None else load_mocov3(self.init).state_dict()

    def loss(self, model: Runner, batch: Tensor, step: Step) -> dict[str, Tensor]:
        first, second = (F.normalize(x, dim=1) for x in model(batch)[:2])
        keys = [F.normalize(x, dim=1) for x in self.taught(model, batch, step)]
        return {"loss": contrast(first, keys[1], self.temperature) + contrast(second, keys[0], self.temperature)}

    def image_tower(self, assets: VisionAssets, model: MoCoV3Model) -> Tower:
        return model.image_tower()


PROOF = Proof(
    [
        (
            "mocov3",
            "--data scattered --views source --batch-size 128 --steps 300 --optimizer adamw --lr 2e-3 "
            "--weight-decay 0.05 --warmup 10",
        )
    ],
    [
        Claim(
            "linear probe accuracy of frozen features (held-out)",
            figure("linear probe accuracy", CLASS_TOKEN),
            floor=0.55,
            ceiling=0.5,
            control="untrained",
        ),
        Claim("deviation of projections (held-out)", DEVIATION, 0.5, control=None),
    ],
)
