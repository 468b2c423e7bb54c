"""Views of images for self-supervision beside CLIP's contrast, SLIP's and DeCLIP's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.transforms.views import MOCO_V2, seen
from mmcore.ops import require
from mmcore.parts.heads import check_batch
from mmcore.recipe import Runner
from mmcore.systems.clip.recipe import Clip
from mmcore.two_towers import PairAssets


@dataclass(frozen=True)
class WithViews(Clip):
    """Mixin: pairs of augmented views of an image, MoCo v2's, and a head on the image tower that is trained on them:
    `model(images, only_projection=True)`."""

    view_scale: float = 0.08
    """Least share of an image's area that a view shows."""
    view_flip: float = 0.5
    """Probability that a view is mirrored; 0 where left and right mean something, as in digits."""

    tasks = ("zeroshot", "retrieval", "projection")

    def assets(self, data: PairData) -> PairAssets:
        op = type(self).__name__.lower()
        check_batch(op, self.run.batch_size)
        require(op, 0 < self.view_scale <= 1, "--view-scale must be above 0 and at most 1, got {}", self.view_scale)
        require(op, 0 <= self.view_flip <= 1, "--view-flip must be in [0, 1], got {}", self.view_flip)
        for flag, locks in (("image", self.lock_image), ("text", self.lock_text)):
            require(
                op, not locks, "--lock-{} must be left out: the towers learn by more than pairs, got {}", flag, locks
            )
        return super().assets(data)

    def views(self, assets: PairAssets, record: Any, rng: np.random.Generator) -> Tensor:
        """uint8 [2, 3, S, S], each drawn apart."""
        view = replace(MOCO_V2[0], scale=(self.view_scale, 1.0), flip=self.view_flip)
        return torch.stack([seen(record, assets.preprocess, rng, view) for _ in range(2)])

    def projects(self, assets: PairAssets, model: Runner, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images, only_projection=True)
