"""SLIP's recipe: CLIP's loss of pairs, and SimCLR's of two views of each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.collate import PairSample
from mmcore.losses import global_contrastive_loss, nt_xent_loss
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.settings import once
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.recipe import Clip, ClipBatch
from mmcore.systems.clip.views import WithViews
from mmcore.systems.slip.model import SLIP
from mmcore.systems.slip.weights import is_published, load_slip
from mmcore.tasks.projection import DEVIATION
from mmcore.train.optim import OptimConfig
from mmcore.two_towers import PairAssets

_published = partial(OptimConfig, lr=3e-3, eps=1e-8, weight_decay=0.1, min_lr=1e-5, warmup_lr=1e-6)


class SlipSample(NamedTuple):
    """A pair, and two views of its image, uint8 [2, 3, S, S]."""

    pair: PairSample
    views: Tensor


class SlipBatch(NamedTuple):
    """What CLIP reads, and the views, uint8 [B, 2, 3, S, S]."""

    pairs: ClipBatch
    views: Tensor


@dataclass(frozen=True)
class Slip(WithViews):
    """Train SLIP (arXiv 2112.12750) on image-caption pairs: CLIP, and SimCLR of two views of each image."""

    optim: OptimConfig = field(default_factory=_published)
    init: Path | None = field(default=None, metadata=once)
    """Weights to start from: as those of clip, or a published file of SLIP (slip_base_100ep.pt, or its CLIP's)."""
    ssl_scale: float = 1.0
    """Weight of SimCLR's loss."""
    ssl_temperature: float = 0.1
    """Temperature of SimCLR's loss."""
    ssl_hidden: int = 4096
    """Width of the hidden layers of SimCLR's head."""
    ssl_width: int = 256
    """Width of what it gives."""

    kind = SLIP
    training_only = ("image_mlp.",)

    def assets(self, data: PairData) -> PairAssets:
        for flag, value in (("hidden", self.ssl_hidden), ("width", self.ssl_width)):
            require("slip", value >= 1, "--ssl-{} must be at least 1, got {}", flag, value)
        require("slip", self.ssl_scale >= 0, "--ssl-scale must be at least 0, got {}", self.ssl_scale)
        require("slip", self.ssl_temperature > 0, "--ssl-temperature must be above 0, got {}", self.ssl_temperature)
        return super().assets(data)

    def make(self, shape: Any) -> SLIP:
        return SLIP(shape, self.ssl_hidden, self.ssl_width)

    def _start(self) -> CLIP:
        assert self.init is not None
        if not (self.init.is_file() and is_published(self.init)):
            return super()._start()
        require("slip", self.model is None, "--model must be left out with SLIP's own file, got {}", self.model)
        return load_slip(self.init)

    def initial(self, assets: PairAssets, model: CLIP | None) -> Mapping[str, Tensor]:
        found = super().initial(assets, model)
        if "image_mlp.layer1.weight" in found:
            sizes = tuple(len(found[f"image_mlp.layer{i}.weight"]) for i in (1, 3))
            given = self.ssl_hidden, self.ssl_width
            what = "--ssl-hidden and --ssl-width must be {}, as {} has them, got {}"
            require("slip", sizes == given, what, sizes, self.init, given)
        return found

    def sample(self, assets: PairAssets, record: Any, rng: np.random.Generator) -> SlipSample:  # pyright: ignore[reportIncompatibleMethodOverride]
        pair = super().sample(assets, record, rng)
        return SlipSample(pair, self.views(assets, record, rng))

    def collate(self, assets: PairAssets, samples: list[SlipSample]) -> SlipBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        pairs = Clip.collate(self, assets, [x.pair for x in samples])
        return SlipBatch(pairs, torch.stack([x.views for x in samples]))

    def features(self, model: Runner, batch: Any) -> tuple[Tensor, ...]:
        return model(*batch.pairs[:4], views=batch.views)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        image, text, first, second, scale = features
        contrast = global_contrastive_loss(image, text, scale)
        simclr = nt_xent_loss(first, second, self.ssl_temperature)
        return {"loss": contrast + self.ssl_scale * simclr, "contrast": contrast, "simclr": simclr}


PROOF = Proof(
    [
        (
            "slip",
            "--data digits --model tiny --ssl-hidden 128 --ssl-width 32 --view-scale 0.5 --view-flip 0 "
            "--epochs 30 --lr 1e-3 --ema 0.99",
        )
    ],
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.88),
        Claim("deviation of projections (held-out)", DEVIATION, 0.5, control=None),
    ],
)
