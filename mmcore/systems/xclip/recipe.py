"""xCLIP's recipe: CLIP's loss, and a loss of assignments that needs no negatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.losses import global_assignment_losses, global_contrastive_loss
from mmcore.ops import require
from mmcore.parts.heads import check_batch
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.clip.recipe import Clip
from mmcore.systems.xclip.model import XCLIP
from mmcore.tasks.projection import UNUSED, USED
from mmcore.two_towers import PairAssets


@dataclass(frozen=True)
class XClip(Clip):
    """Train xCLIP (arXiv 2210.09304) on image-caption pairs: CLIP, and both sides of a pair in the same cluster."""

    clusters: int = 32_768
    """Clusters that images and captions are assigned to."""
    head_width: int = 4096
    """Width of the hidden layer of the heads that assign them."""
    # recalled from the paper: there is no code
    sharpness: float = 0.5
    """Weight of the entropy of each assignment, which is made small."""
    smoothness: float = 1.5
    """Weight of the entropy of the mean assignment, which is made large; with 0 all fall into few clusters."""

    kind = XCLIP
    tasks = ("zeroshot", "retrieval", "projection")
    training_only = ("image_head.", "text_head.")

    def assets(self, data: PairData) -> PairAssets:
        require("xclip", self.clusters >= 2, "--clusters must be at least 2, got {}", self.clusters)
        require("xclip", self.head_width >= 1, "--head-width must be at least 1, got {}", self.head_width)
        for flag, value in (("sharpness", self.sharpness), ("smoothness", self.smoothness)):
            require("xclip", value >= 0, "--{} must be at least 0, got {}", flag, value)
        check_batch("xclip", self.run.batch_size)
        return super().assets(data)

    def make(self, shape: Any) -> XCLIP:
        return XCLIP(shape, self.clusters, self.head_width)

    def features(self, model: Runner, batch: Any) -> tuple[Tensor, ...]:
        return model(*batch[:4], with_heads=True)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        image, text, of_image, of_text, scale = features
        contrast = global_contrastive_loss(image, text, scale)
        found = global_assignment_losses(of_image, of_text)
        weighted = self.sharpness * found.entropy - self.smoothness * found.entropy_of_mean
        return {"loss": contrast + found.agreement + weighted, "contrast": contrast, **found._asdict()}

    def projects(self, assets: PairAssets, model: Runner, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images, None, with_heads=True)[2]


_RUN = "--data digits --model tiny --clusters 64 --head-width 128 --epochs 30 --lr 1e-3 --ema 0.99"
PROOF = Proof(
    [("xclip", _RUN)],
    [
        # the least that CLIP's own proof asks for, less .02
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.88),
        Claim("clusters used (held-out)", USED, 0.1, control=None),
    ],
)
# a used share of at most 3 of 64, which the other records' images cannot tell from
COLLAPSE = Proof(
    [("xclip", f"{_RUN} --smoothness 0")],
    [Claim("clusters unused without smoothness (held-out)", UNUSED, 61 / 64, control=None)],
)
"""The control: what the entropy of the mean is for."""
