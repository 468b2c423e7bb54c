"""iBOT's recipe: DINO's, with masked patches."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.transforms import views
from mmcore.data.transforms.masks import block_mask
from mmcore.losses import patch_distillation_loss
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step, VisionAssets
from mmcore.systems.dino.model import Outputs
from mmcore.systems.dino.recipe import FLAGS, NUM_LARGE, Crops, SelfDistillation, shape_of
from mmcore.systems.vit.shapes import shapes
from mmcore.tasks.agreement import AGREEMENT, Agrees
from mmcore.tasks.projection import DEVIATION, ENTROPY_OF_MEAN

_ASPECT = 0.3
_shape = partial(shape_of, num_prototypes=8192)


@dataclass(frozen=True)
class MaskedDistillation(SelfDistillation):
    """Mixin: the student's large views have masked patches, of which the teacher, which sees them, says what they
    are."""

    mask_rate: float = 0.5
    """Share of the large views that have masked patches."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of their patches that are masked, from and to, drawn for each."""
    patch_weight: float = 1.0
    """Of the loss of masked patches, beside that of views."""

    tasks = ("features", "projection", "agreement")

    @property
    def has_patches(self) -> bool:
        return True

    def assets(self, data: PairData) -> VisionAssets:
        low, high = self.mask_ratio
        require(self.name, 0 <= self.mask_rate <= 1, "--mask-rate must be in [0, 1], got {}", self.mask_rate)
        require(self.name, 0 < low <= high < 1, "--mask-ratio must be from and to within (0, 1), got {} {}", low, high)
        require(self.name, self.patch_weight >= 0, "--patch-weight must be at least 0, got {}", self.patch_weight)
        return super().assets(data)

    def least_block(self, side: int) -> int:
        """Patches of the smallest rectangle that is masked, on a grid of `side` by `side`."""
        return (side // 3) ** 2

    def mask(self, assets: VisionAssets, rng: np.random.Generator) -> Tensor:
        """The masked patches of a view, bool [P]: rectangles, one patch at least."""
        side = assets.shape.vision.image_size // assets.shape.vision.patch_size
        count = max(1, int(rng.uniform(*self.mask_ratio) * side**2))
        least = max(1, min(self.least_block(side), count))
        return torch.from_numpy(block_mask((side, side), count, least, _ASPECT, rng).reshape(-1))

    def sample(self, assets: VisionAssets, record: Any, rng: np.random.Generator) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        large, small = super().sample(assets, record, rng)
        none = torch.zeros(assets.shape.vision.num_patches, dtype=torch.bool)
        masks = [self.mask(assets, rng) if rng.random() < self.mask_rate else none for _ in range(NUM_LARGE)]
        return large, small, torch.stack(masks)

    def collate(self, assets: VisionAssets, samples: list[tuple[Tensor, ...]]) -> Crops:
        large, small, masked = (torch.stack(x, 1) for x in zip(*samples, strict=True))
        shares = (1 / masked.sum(2, keepdim=True).clamp(min=1)).expand(masked.shape)[masked]
        return Crops(large, small, masked, masked.flatten().nonzero()[:, 0], shares)

    def objective(self, student: Outputs, teacher: Outputs, batch: Crops, step: Step) -> dict[str, Tensor]:
        losses = super().objective(student, teacher, batch, step)
        assert student.patches is not None and teacher.patches is not None and batch.shares is not None
        logits, temperature, centre = self.targets(teacher.patches, "patch_centre", step)
        counted = batch.shares, batch.large.shape[:2].numel(), self.student_temperature
        return {**losses, "patches": patch_distillation_loss(student.patches, logits, *counted, temperature, centre)}

    def weights(self, step: Step) -> Mapping[str, float]:
        return {**super().weights(step), "patches": self.patch_weight}

    def agrees(self, assets: VisionAssets, model: Runner, device: torch.device) -> Agrees:
        def of_patches(images: Tensor, masked: Tensor | None = None) -> Tensor:
            num = len(images) * assets.shape.vision.num_patches
            places = torch.arange(num, device=images.device)
            found: Outputs = model(images[None], None, None if masked is None else masked[None], places)
            assert found.patches is not None
            return found.patches.unflatten(0, (len(images), -1))

        return Agrees(assets.preprocess, partial(self.mask, assets), of_patches)


@dataclass(frozen=True)
class Ibot(MaskedDistillation):
    """Train iBOT (arXiv 2111.07832) on the images of any source: DINO, and of masked patches what the teacher makes of
    them, by one head."""

    centring: Literal["centre", "none"] = "centre"
    """centre = the running means of the teacher's outputs, of images and of patches, are taken off them; none =
    collapse, for comparison."""

    shapes = shapes(_shape, "ViT-S-16", "ViT-B-16", "ViT-L-16", drop_path=0.1, has_mask_token=True)
    published_views = views.IBOT
    centres_patches = True

    @property
    def centres(self) -> str:
        return self.centring


_SMALLER = {"--batch-size 128": "--batch-size 64", "--teacher-momentum 0.98": "--teacher-momentum 0.95"}
PROOF = Proof(
    [("ibot", reduce(lambda flags, pair: flags.replace(*pair), _SMALLER.items(), FLAGS))],
    [
        Claim("masked patches like the teacher's, above the most frequent prototype (held-out)", AGREEMENT, 0.05),
        Claim("deviation of outputs (held-out)", DEVIATION, 0.3, control=None),
        Claim("entropy of the mean output over ln K (held-out)", ENTROPY_OF_MEAN, 0.5, control=None),
    ],
)
