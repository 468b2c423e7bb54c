"""MAE's recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from mmcore.data import PairData
from mmcore.data.transforms.views import MAE as MAE_VIEWS
from mmcore.image_recipe import ImageRecipe
from mmcore.losses import global_ratio
from mmcore.parts.pixels import masked_error
from mmcore.recipe import Claim, Proof, Runner, Step, VisionAssets
from mmcore.settings import once
from mmcore.systems.mae.model import MAE, MAEConfig
from mmcore.systems.mae.shapes import MAE_CONFIGS
from mmcore.systems.mae.weights import read_published, save_mae
from mmcore.tasks.reconstruction import Reconstructs
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

_PUBLISHED = partial(OptimConfig, lr=1.5e-4, beta2=0.95, eps=1e-8, weight_decay=0.05, warmup=12_500, warmup_share=0.05)


@dataclass(frozen=True)
class Mae(ImageRecipe):
    """Train a masked autoencoder (arXiv 2111.06377) on the images of any source; captions are not needed."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=800))
    optim: OptimConfig = field(default_factory=_PUBLISHED)
    model: str = "tiny"
    """tiny, ViT-B-16, ViT-L-16, ViT-H-14."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    init: Path | None = field(default=None, metadata=once)
    """A file of MAE as published, to start from; of one without a decoder that is new."""
    norm_pix: bool | None = None
    """Predict the pixels of a patch with its mean and variance taken out; None = as --model has it: the published ones
    do, tiny does not."""
    views: Literal["mae", "source"] = "mae"  # pyright: ignore[reportIncompatibleVariableOverride]
    """mae = a crop of at least a fifth of the area, flipped or not, as published; source = the view that its source
    trains on, of scanned digits a small shift and zoom."""

    shapes = MAE_CONFIGS
    kind = MAE
    published_views = MAE_VIEWS
    pool = "mean"
    tasks = ("reconstruction",)

    def shape(self) -> MAEConfig:
        shape = MAE_CONFIGS[self.model]
        norm_pix = shape.norm_pix if self.norm_pix is None else self.norm_pix
        return replace(shape, mask_ratio=self.mask_ratio, norm_pix=norm_pix)

    def assets(self, data: PairData) -> VisionAssets:
        assets = super().assets(data)
        if self.init is not None:
            read_published("mae", self.init, MAE(assets.shape))
        return assets

    def initial(self, assets: VisionAssets, model: MAE) -> Mapping[str, Tensor]:
        return {} if self.init is None else read_published("mae", self.init, model)

    def build(self, assets: VisionAssets) -> MAE:
        model = super().build(assets)
        model.decoder.transformer.activation_checkpointing = self.activation_checkpointing
        return model

    def sample(self, assets: VisionAssets, record: Any, rng: np.random.Generator) -> Any:
        return self.view(record, assets.preprocess, rng, 0), assets.shape.mask(rng)

    def collate(self, assets: VisionAssets, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return tuple(default_collate(samples))

    def loss(self, model: Runner, batch: tuple[Tensor, Tensor], step: Step) -> dict[str, Tensor]:
        predicted, target = model(*batch)
        return {"loss": global_ratio(*masked_error(predicted, target, batch[1]))}

    def reconstructs(self, assets: VisionAssets, model: Runner, device: torch.device) -> Reconstructs:
        mask, targets = assets.shape.mask, assets.shape.targets
        return Reconstructs(assets.preprocess, mask, targets, lambda *seen: model(*seen)[0], targets.draw)

    def export(self, assets: VisionAssets, model: MAE, folder: Any, format: str) -> None:
        save_mae(model, folder)


_FLAGS = "--data digits --model tiny --views source --epochs 72 --batch-size 128 --lr 3e-3 --schedule const-cooldown"
PROOF = Proof(
    [("mae", _FLAGS)], [Claim("R^2 of masked patches (held-out)", "R^2 of masked patches", 0.35, ceiling=0.0)]
)
