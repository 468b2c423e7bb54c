"""What runs keep of what their targets come from, a tokenizer or a teacher, and the recipes of such runs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data import PairData, Preprocess
from mmcore.image_recipe import ImageRecipe
from mmcore.recipe import VisionAssets
from mmcore.settings import from_json, once
from mmcore.systems.mim.teachers import load_teacher, saved_teacher, teacher_of
from mmcore.systems.mim.tokenizers import DallETokens, PatchTokens
from mmcore.systems.mim.vqkd import tokenizer_of


@dataclass(frozen=True)
class MimAssets(VisionAssets):
    """The shape of a model, and what its targets come from: settings as JSON holds them, whose weights are `frozen`."""

    source: Mapping[str, Any] = field(default_factory=dict)
    _made: dict[torch.device, Any] = field(default_factory=dict, compare=False, repr=False)

    def save(self, folder: Path) -> dict[str, Any]:
        return {**super().save(folder), "source": dict(self.source)}

    def __getstate__(self) -> dict[str, Any]:  # for processes that read data
        return {**self.__dict__, "_made": {}, "frozen": {}}

    def made(self, device: torch.device) -> Any:
        """The tokenizer or the teacher, in evaluation mode on a device."""
        if device not in self._made:
            # a copy: what a file is mapped from is not written to
            self._made[device] = _module(self.source, self.frozen, self.shape).to(device)
        return self._made[device]

    @property
    def seen(self) -> Preprocess:
        """What the tokenizer or teacher wants of an image."""
        own, kind = self.preprocess, self.source.get("kind")
        if kind == "dalle":
            return Preprocess(8 * self.shape.side, interpolation="lanczos")
        if kind in ("teacher", "vqkd"):
            vision = self.source["shape"]["vision"]
            return Preprocess(vision["image_size"], interpolation=vision["interpolation"])
        return own

    @property
    def summary(self) -> dict[str, str]:
        known = {
            "kmeans": "{} nearest patches of pixels",
            "dalle": "{} tokens of DALL-E's encoder",
            "vqkd": "{} tokens of VQ-KD",
            "teacher": "{} features of a teacher",
        }
        kind = self.source.get("kind")
        found = {} if kind is None else {"targets": known[kind].format(self.shape.outputs)}
        return {**super().summary, **found}


def _module(source: Mapping[str, Any], state: Mapping[str, Tensor], shape: Any) -> nn.Module:
    kind = source["kind"]
    if kind == "teacher":
        return teacher_of(source["shape"], dict(state))
    if kind == "vqkd":
        return tokenizer_of(source["shape"], state)  # pyright: ignore[reportArgumentType]
    if kind == "kmeans":
        return PatchTokens(state["centres"], shape.vision.preprocess)
    module = DallETokens(source["settings"], shape.side)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class Sourced(ImageRecipe):
    """Mixin: what is predicted comes from something that does not learn, and that a run keeps."""

    def assets(self, data: PairData) -> MimAssets:
        return self.with_source(data, super().assets(data).shape)

    def with_source(self, data: PairData, shape: Any) -> MimAssets:
        """What the targets come from, and the shape with as many outputs."""
        return MimAssets(shape)

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> MimAssets:
        kind = type(next(iter(self.shapes.values())))
        return MimAssets(from_json(kind, saved), saved.get("source", {}), frozen=frozen)

    def both_views(self, assets: MimAssets, record: Any, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """A view of the model's size, and the same in the size that a tokenizer or teacher wants, where it differs."""
        own, other = assets.preprocess, assets.seen
        if (own.size, own.interpolation) == (other.size, other.interpolation):
            return (self.view(record, own, rng, 0),)
        again = copy.deepcopy(rng)  # the same numbers give the same crop
        return self.view(record, own, rng, 0), self.view(record, other, again, 0)


@dataclass(frozen=True)
class WithTeacher(Sourced):
    """Mixin: features of patches are predicted, which a tower that does not learn makes of whole images."""

    teacher: Path | None = field(default=None, metadata=once)
    """The tower whose features of patches are predicted, behind its final norm and its projection: a run, such as of
    clip, or a folder of transformers or open_clip."""

    def with_source(self, data: PairData, shape: Any) -> MimAssets:
        config, state = load_teacher(self.name, self.teacher, shape.vision.image_size // shape.vision.patch_size)
        source = {"kind": "teacher", "shape": saved_teacher(config)}
        return MimAssets(replace(shape, outputs=config.width), source, frozen=state)


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, S, S] in another size."""
    if images.shape[-1] == size:
        return images
    x = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)
