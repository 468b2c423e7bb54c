"""DINOv2's recipe: iBOT's, with even assignments and spread features; DINOv3's Gram anchoring."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcore.data import PairData
from mmcore.data.transforms import views
from mmcore.image_recipe import CLASS_TOKEN
from mmcore.losses import gram_loss, koleo_loss
from mmcore.ops import require
from mmcore.parts.vit import Tower, VisionConfig
from mmcore.recipe import Claim, Proof, Step, VisionAssets
from mmcore.systems.dino.model import DINOConfig, DINOModel, Outputs
from mmcore.systems.dino.recipe import FLAGS, Crops, published_optim
from mmcore.systems.dinov2.weights import save_dinov2
from mmcore.systems.ibot.recipe import MaskedDistillation
from mmcore.systems.vit.shapes import shapes
from mmcore.tasks.features import figure
from mmcore.tasks.projection import DEVIATION, ENTROPY_OF_MEAN
from mmcore.train.config import EngineConfig
from mmcore.train.optim import OptimConfig, Rule

# lr 0.004 sqrt(B / 1,024) of the batch of 1,024; 10 epochs of warm-up, of 1,250 steps
_optim = partial(published_optim, lr=4e-3, warmup=12_500, layer_decay=0.9, clip_each=None)
_GIANT = 1536
_LARGE = 1024


def _shape(vision: VisionConfig, is_tiny: bool) -> DINOConfig:
    """As published: from L on with a head of patches, the giant gated."""
    if is_tiny:
        return DINOConfig(replace(vision, layer_scale=1.0, drop_path=0.0), 256, 64, 128, init_std=None)
    vision = replace(vision, has_swiglu=vision.width == _GIANT)
    if vision.width < _LARGE:
        return DINOConfig(vision, learns_norm=True)
    return DINOConfig(replace(vision, drop_path=0.4), 2048, 384, 131_072, learns_norm=True, patch_prototypes=131_072)


@dataclass(frozen=True)
class Dinov2(MaskedDistillation):
    """Train DINOv2 (arXiv 2304.07193) on the images of any source: views and masked patches are learned from a teacher
    whose prototypes are used evenly, while the images of a batch are kept apart; with registers, and with DINOv3's Gram
    anchoring (2508.10104), where they are asked for."""

    optim: OptimConfig = field(default_factory=_optim)
    engine: EngineConfig = field(default_factory=partial(EngineConfig, grad_clip=3.0))
    centring: Literal["sinkhorn-knopp", "centre", "none"] = "sinkhorn-knopp"
    """sinkhorn-knopp = the prototypes share the images of a batch evenly; centre = as DINO and iBOT; none = collapse,
    for comparison."""
    koleo_weight: float = 0.1
    """Of the loss that keeps the images of a batch apart, in each of their large views."""
    registers: int = 0
    """Registers of the tower (arXiv 2309.16588); 4 in the published towers that have them."""
    teacher_momentum: float = 0.992
    """Momentum of the teacher's weights at the first step."""
    freeze_last_layer: int = 1_250
    """Steps at the beginning in which the last layer of a head stays as it is (an epoch, as published)."""
    gram_weight: float | None = None
    """Of Gram anchoring (DINOv3: 2.0): the cosines among an image's patches stay those of an earlier teacher; None =
    off."""
    gram_start: int = 0
    """Step that Gram anchoring begins at; its teacher is the momentum teacher as it is then."""
    gram_every: int = 10_000
    """Steps after which that is taken anew."""

    shapes = shapes(
        _shape, "ViT-S-14", "ViT-B-14", "ViT-L-14", "ViT-g-14",
        has_mask_token=True, layer_scale=1e-5, drop_path=0.3, drop_path_uniform=True,
    )  # fmt: skip
    published_views = views.DINOV2
    accumulates = False  # assignments and distances are of the whole batch

    @property
    def centres(self) -> str:
        return self.centring

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("visual.patch_embed", lr_scale=0.2), *super().rules)

    def least_block(self, side: int) -> int:
        return 4

    def shape(self) -> DINOConfig:
        shape = super().shape()
        return replace(shape, vision=replace(shape.vision, num_registers=self.registers))

    def assets(self, data: PairData) -> VisionAssets:
        for name in ("koleo_weight", "registers", "gram_weight", "gram_start"):
            value = getattr(self, name) or 0
            require("dinov2", value >= 0, "--{} must be at least 0, got {}", name.replace("_", "-"), value)
        require("dinov2", self.gram_every >= 1, "--gram-every must be at least 1, got {}", self.gram_every)
        has_effect = self.gram_weight is not None or (self.gram_start, self.gram_every) == (0, 10_000)
        require("dinov2", has_effect, "--gram-weight must be given with --gram-start or --gram-every, got {}", None)
        size = self.per_rank
        is_enough = self.koleo_weight == 0 or size >= 2
        require("dinov2", is_enough, "--batch-size must be at least 2, which --koleo-weight needs, got {}", size)
        return super().assets(data)

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        found = dict(super().companions(model))
        if self.gram_weight is not None:
            found["gram"] = copy.deepcopy(model.module.visual).requires_grad_(False).eval()
        return found

    def objective(self, student: Outputs, teacher: Outputs, batch: Crops, step: Step) -> dict[str, Tensor]:
        losses = super().objective(student, teacher, batch, step)
        if self.koleo_weight and step.companions:  # a plan counts a single image
            losses["koleo"] = torch.stack([koleo_loss(x) for x in student.tokens]).sum()
        anchor = step.companions.get("gram")
        if anchor is not None and step.number >= self.gram_start:
            is_low = student.large.dtype == torch.bfloat16
            with torch.no_grad(), torch.autocast(student.large.device.type, dtype=torch.bfloat16, enabled=is_low):
                states = anchor(batch.large.flatten(0, 1))
            losses["gram"] = gram_loss(student.states, states[:, states.shape[1] - student.states.shape[1] :])
        return losses

    def weights(self, step: Step) -> Mapping[str, float]:
        return {**super().weights(step), "koleo": self.koleo_weight, "gram": self.gram_weight or 0.0}

    def after_step(self, model: Any, step: Step) -> None:
        super().after_step(model, step)
        anchor, done = step.companions.get("gram"), step.number + 1
        if anchor is not None and done >= self.gram_start and (done - self.gram_start) % self.gram_every == 0:
            teacher: Any = step.companions["teacher"]
            anchor.load_state_dict(teacher.teacher.visual.state_dict())

    def export(self, assets: VisionAssets, model: DINOModel, folder: Path, format: str) -> None:
        save_dinov2(Tower(assets.shape.vision, model.visual.state_dict()), folder)


_SHORT = {
    "--steps 600": "--steps 300",
    "--warmup 60": "--warmup 10",
    "--teacher-momentum 0.98": "--teacher-momentum 0.95",
}
PROOF = Proof(
    [("dinov2", reduce(lambda flags, pair: flags.replace(*pair), _SHORT.items(), FLAGS))],
    [
        Claim(
            "k-NN accuracy of frozen features (held-out)",
            figure("k-NN accuracy", CLASS_TOKEN),
            floor=0.5,
            ceiling=0.45,
            control="untrained",
        ),
        Claim("deviation of outputs (held-out)", DEVIATION, 0.5, control=None),
        Claim("entropy of the mean output over ln K (held-out)", ENTROPY_OF_MEAN, 0.95, control=None),
    ],
)
