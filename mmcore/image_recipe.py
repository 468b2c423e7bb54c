"""What recipes that learn an image tower from pictures alone have in common: SimCLR, DINO, MAE, BEiT and others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.data import LoaderSpec, PairData, Preprocess, TrainLoader
from mmcore.data.transforms.views import View, seen
from mmcore.figures import DEVIATION
from mmcore.ops import require
from mmcore.parts.image_tower import ImagePool, PooledTower
from mmcore.parts.vit import Tower, VisionConfig
from mmcore.recipe import OnPairs, Represents, Runner, VisionAssets
from mmcore.settings import free, from_json

CLASS_TOKEN, PATCH_MEAN = "class token", "mean of patches"


def states_of(model: Any, images: Tensor) -> Tensor:
    """[B, prefix + P, D]: what the image tower makes of whole images, by the model's own forward, which an engine
    wraps."""
    return model(images, only_states=True)


def of_states(config: VisionConfig, states: Callable[[Tensor], Tensor]) -> Represents:
    """The class token, where there is one, and the mean of the patches, of what a tower makes of images."""
    names = (CLASS_TOKEN, PATCH_MEAN) if config.has_class_token else (PATCH_MEAN,)

    def compute(images: Tensor) -> list[Tensor]:
        found = states(images)
        mean = found[:, config.num_prefix :].mean(1)
        return [found[:, 0], mean] if config.has_class_token else [mean]

    return Represents(config.preprocess, names, compute)


@dataclass(frozen=True)
class ImageRecipe(OnPairs):
    """Mixin: trains a model with an image tower `visual`, a `ViT`, on the images of any source; captions are not
    needed.

    `assets` are a `VisionAssets` of `shapes[model]`, a dataclass with a `vision`, and `kind(shape)` makes the model,
    whose `forward(images, only_states=True)` returns the tower's states [B, prefix + P, D] of whole images.
    """

    model: str = "tiny"
    """A shape by its name."""
    views: Literal["published", "source"] = "published"
    """published = crops and changes of colour as the paper has them; source = the view that its source trains on: of
    scanned digits a small shift and zoom, of scattered ones another place."""
    view_flip: float | None = None
    """Probability that a view is mirrored; 0 where left and right mean something, as in digits; None = as published."""
    view_scale: float | None = None
    """Least share of an image's area that a view shows; None = as published."""
    activation_checkpointing: bool = field(default=False, metadata=free)
    """Recompute activations in the backward: less memory, about a third more time."""

    shapes: ClassVar[Mapping[str, Any]]
    """By their names."""
    kind: ClassVar[Callable[[Any], nn.Module]]
    """The model, made of a shape."""
    published_views: ClassVar[Sequence[View]] = ()
    """Of a sample, in their order."""
    pool: ClassVar[ImagePool] = "class"
    """How other recipes read the tower as one vector."""
    tasks = ("features",)
    least: ClassVar[Mapping[str, float]] = {DEVIATION: 0.05}
    formats = ("hf",)

    @property
    def name(self) -> str:
        """For messages."""
        return type(self).__name__.lower()

    def loader(self, data: PairData, assets: Any, spec: LoaderSpec) -> TrainLoader:
        return data.image_loader(spec, self.reader(assets))

    def assets(self, data: PairData) -> VisionAssets:
        known = ", ".join(self.shapes)
        require(self.name, self.model in self.shapes, "--model must be one of {}, got {!r}", known, self.model)
        for flag, value in (("flip", self.view_flip), ("scale", self.view_scale)):
            is_share = value is None or (0 <= value <= 1 and (flag == "flip" or value > 0))
            require(self.name, is_share, "--view-{} must be in [0, 1], a scale above 0, got {}", flag, value)
            has_effect = value is None or self.views != "source"
            require(self.name, has_effect, "--view-{} has no effect with --views source, got {}", flag, value)
        return VisionAssets(self.shape())

    def shape(self) -> Any:
        """Of the model, with what flags change of `shapes[self.model]`."""
        return self.shapes[self.model]

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> VisionAssets:
        return VisionAssets(from_json(type(next(iter(self.shapes.values()))), saved))

    def build(self, assets: VisionAssets) -> Any:
        model: Any = type(self).kind(assets.shape)
        model.visual.transformer.activation_checkpointing = self.activation_checkpointing
        return model

    def view(self, record: Any, preprocess: Preprocess, rng: np.random.Generator, number: int) -> Tensor:
        """View `number` of those that are published, uint8 [3, S, S], of the model's size."""
        published = self.published_views[number]
        if self.view_flip is not None:
            published = replace(published, flip=self.view_flip)
        if self.view_scale is not None:
            published = replace(published, scale=(self.view_scale, max(self.view_scale, published.scale[1])))
        return seen(record, preprocess, rng, None if self.views == "source" else published)

    def all_views(self, record: Any, preprocess: Preprocess, rng: np.random.Generator) -> Tensor:
        """uint8 [V, 3, S, S], each drawn apart; of the model's size."""
        return torch.stack([self.view(record, preprocess, rng, i) for i in range(len(self.published_views))])

    def represents(self, assets: VisionAssets, model: Runner, device: torch.device) -> Represents:
        return of_states(assets.shape.vision, partial(states_of, model))

    def image_tower(self, assets: VisionAssets, model: Any) -> Tower:
        return Tower(assets.shape.vision, model.visual.state_dict()).bare

    def pooled_tower(self, assets: VisionAssets, model: Any) -> PooledTower:
        tower = self.image_tower(assets, model)
        return PooledTower(tower.config, type(self).pool, tower.state)
