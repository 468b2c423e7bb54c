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

from mmcore.data import LoaderSpec, PairData, TrainLoader
from mmcore.data.transforms import views
from mmcore.losses import global_ratio
from mmcore.ops import require
from mmcore.parts.pixels import masked_error
from mmcore.parts.vit import Tower
from mmcore.recipe import Claim, OnPairs, Proof, Runner, Step, VisionAssets
from mmcore.settings import free, from_json
from mmcore.systems.mae.model import MAE, MAEConfig
from mmcore.systems.mae.shapes import MAE_CONFIGS
from mmcore.systems.mae.weights import save_mae
from mmcore.tasks.reconstruction import Reconstructs
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

_PUBLISHED = partial(OptimConfig, lr=1.5e-4, beta2=0.95, eps=1e-8, weight_decay=0.05, warmup=12_500, warmup_share=0.05)


@dataclass(frozen=True)
class Mae(OnPairs):
    """Train a masked autoencoder (arXiv 2111.06377) on the images of any source; captions are not needed."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=800))
    optim: OptimConfig = field(default_factory=_PUBLISHED)
    model: str = "tiny"
    """tiny, ViT-B-16, ViT-L-16, ViT-H-14."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    norm_pix: bool | None = None
    """Predict the pixels of a patch with its mean and variance taken out; None = as --model has it: the published ones
    do, tiny does not."""
    views: Literal["mae", "source"] = "mae"
    """mae = a crop of at least a fifth of the area, flipped or not, as published; source = the view that its source
    trains on, of scanned digits a small shift and zoom."""
    activation_checkpointing: bool = field(default=False, metadata=free)
    """Recompute activations in the backward: less memory, about a third more time."""

    tasks = ("reconstruction",)
    formats = ("hf",)

    def loader(self, data: PairData, assets: VisionAssets, spec: LoaderSpec) -> TrainLoader:
        return data.image_loader(spec, self.reader(assets))

    def assets(self, data: PairData) -> VisionAssets:
        require(
            "mae", self.model in MAE_CONFIGS, "--model must be one of {}, got {!r}", ", ".join(MAE_CONFIGS), self.model
        )
        shape = MAE_CONFIGS[self.model]
        norm_pix = shape.norm_pix if self.norm_pix is None else self.norm_pix
        return VisionAssets(replace(shape, mask_ratio=self.mask_ratio, norm_pix=norm_pix))

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> VisionAssets:
        return VisionAssets(from_json(MAEConfig, saved))

    def build(self, assets: VisionAssets) -> MAE:
        model = MAE(assets.shape)
        for part in (model.visual, model.decoder):
            part.transformer.activation_checkpointing = self.activation_checkpointing
        return model

    def sample(self, assets: VisionAssets, record: Any, rng: np.random.Generator) -> Any:
        view = views.MAE[0] if self.views == "mae" else None
        return views.seen(record, assets.preprocess, rng, view), assets.shape.mask(rng)

    def collate(self, assets: VisionAssets, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return tuple(default_collate(samples))

    def loss(self, model: Runner, batch: tuple[Tensor, Tensor], step: Step) -> dict[str, Tensor]:
        predicted, target = model(*batch)
        return {"loss": global_ratio(*masked_error(predicted, target, batch[1]))}

    def reconstructs(self, assets: VisionAssets, model: Runner, device: torch.device) -> Reconstructs:
        mask, targets = assets.shape.mask, assets.shape.targets
        return Reconstructs(assets.preprocess, mask, targets, lambda *seen: model(*seen)[0], targets.draw)

    def image_tower(self, assets: VisionAssets, model: MAE) -> Tower:
        return model.image_tower()

    def export(self, assets: VisionAssets, model: MAE, folder: Path, format: str) -> None:
        save_mae(model, folder)


_FLAGS = "--data digits --model tiny --views source --epochs 72 --batch-size 128 --lr 3e-3 --schedule const-cooldown"
PROOF = Proof(
    [("mae", _FLAGS)], [Claim("R^2 of masked patches (held-out)", "R^2 of masked patches", 0.35, ceiling=0.0)]
)
