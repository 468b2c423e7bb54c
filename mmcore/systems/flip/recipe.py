"""FLIP's recipe: training on fewer tokens than the model is used with, and on all of them at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.transforms.masks import num_kept, random_mask
from mmcore.ops import require
from mmcore.parts.vit import VisionConfig
from mmcore.recipe import Claim, Proof, Step
from mmcore.systems.clip.model import CLIP, TowersConfig
from mmcore.systems.clip.recipe import Clip, ClipBatch
from mmcore.train.optim import OptimConfig
from mmcore.two_towers import PairAssets

# 4e-6 for 256 pairs, in proportion to the batch of 65,536
_published = partial(OptimConfig, lr=1.024e-3, beta2=0.95, eps=1e-8, weight_decay=0.2)


@dataclass(frozen=True)
class FewerTokens(Clip):
    """Mixin of CLIP's recipe: a step reads some patches of an image, a smaller picture, the begin of a caption, and in
    the last steps of the run all of them. What is read is a part of the batch: both forwards of GradCache see it, and
    so does what activation checkpointing computes again."""

    mask_ratio: float = 0.0
    """Share of the patches of an image that are not read: drawn anew each time, as many of each image; the class token
    is always read. 0 = all are read."""
    image_scale: float = 1.0
    """What a picture's side is multiplied by, rounded to patches; positions are interpolated."""
    text_tokens: int | None = None
    """Tokens that a caption is cut to, its end token kept; None = as the model has them."""
    full_share: float = 0.0
    """Last share of the steps in which everything is read."""

    def assets(self, data: PairData) -> PairAssets:
        assets, op = super().assets(data), "train"
        vision, most = assets.shape.vision, assets.shape.text.context_length
        require(op, 0 <= self.full_share < 1, "--full-share must be in [0, 1), got {}", self.full_share)
        require(op, 0 < self.image_scale <= 1, "--image-scale must be above 0 and at most 1, got {}", self.image_scale)
        if self.mask_ratio or self.image_scale < 1:
            is_vit = isinstance(vision, VisionConfig)
            require(op, is_vit, "--mask-ratio and --image-scale must come with a ViT of ours, got {}", vision.summary)
            num = (self._side(vision) // vision.patch_size) ** 2
            fits = self.mask_ratio == 0 or 0 < num_kept(num, self.mask_ratio) < num
            what = "--mask-ratio must leave out and keep at least one of {} patches, got {}"
            require(op, fits, what, num, self.mask_ratio)
        fits = self.text_tokens is None or 3 <= self.text_tokens < most
        require(op, fits, "--text-tokens must be from 3 to {}, got {}", most - 1, self.text_tokens)
        is_less = self.mask_ratio > 0 or self.image_scale < 1 or self.text_tokens is not None
        what = "--mask-ratio, --image-scale or --text-tokens must leave something out, got {}"
        require(op, is_less, what, "none of them")
        return assets

    def build(self, assets: PairAssets) -> CLIP:
        model = super().build(assets)
        model.visual.has_any_size = self.image_scale < 1
        return model

    def _side(self, vision: Any) -> int:
        """Pixels of a picture as it is read."""
        size, patch = vision.image_size, vision.patch_size
        return size if self.image_scale == 1 else max(1, round(size * self.image_scale / patch)) * patch

    def sample(self, assets: PairAssets, record: Any, rng: np.random.Generator) -> Any:
        pair = super().sample(assets, record, rng)
        if not self.mask_ratio:
            return pair, None
        vision = assets.shape.vision
        return pair, random_mask((self._side(vision) // vision.patch_size) ** 2, self.mask_ratio, rng)

    def collate(self, assets: PairAssets, samples: list[Any]) -> ClipBatch:
        pairs, kept = zip(*samples, strict=True)
        batch = super().collate(assets, list(pairs))
        return batch if kept[0] is None else batch._replace(kept=torch.stack(kept))

    def backward(self, model: Any, parts: Sequence[ClipBatch], step: Step) -> dict[str, Tensor]:
        shape = model.module.config
        return super().backward(model, [self.read(model.place(part), step, shape) for part in parts], step)

    def read(self, batch: ClipBatch, step: Step, shape: TowersConfig) -> ClipBatch:
        """What a step reads of a micro-batch."""
        if step.number >= round(step.total * (1 - self.full_share)):
            return batch._replace(kept=None)
        if self.image_scale < 1:
            small = F.interpolate(batch.images.float(), self._side(shape.vision), mode="bicubic", antialias=True)
            batch = batch._replace(images=small.round().clamp(0, 255).to(torch.uint8))
        return batch if self.text_tokens is None else shortened(batch, self.text_tokens)


def shortened(batch: ClipBatch, most: int) -> ClipBatch:
    """With captions of at most `most` tokens, the last of which stays the last."""
    tokens, lengths = batch.tokens[:, :most].clone(), batch.lengths
    rows = torch.tensor([i for i, length in enumerate(lengths) if length > most], dtype=torch.int64)
    ends = torch.tensor([lengths[i] - 1 for i in rows.tolist()], dtype=torch.int64)
    rows, ends = rows.to(tokens.device), ends.to(tokens.device)
    tokens[rows, most - 1] = batch.tokens[rows, ends]
    return batch._replace(tokens=tokens, lengths=[min(length, most) for length in lengths])


@dataclass(frozen=True)
class Flip(FewerTokens):
    """Train FLIP (arXiv 2212.00794): CLIP on a part of each image's patches, then on all of them."""

    optim: OptimConfig = field(default_factory=_published)
    mask_ratio: float = 0.5
    """Share of the patches of an image that are not read: drawn anew each time, as many of each image; the class token
    is always read. Published: 0.5 and 0.75."""
    full_share: float = 0.01
    """Last share of the steps in which all patches are read."""


PROOF = Proof(
    [("flip", "--data digits --model tiny --epochs 30 --lr 1e-3 --ema 0.99 --full-share 0.1")],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.8)],
)
