"""ViT's recipe: classification, fine-tuning of any tower, and distillation from another classifier."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from mmcore.data import PairData
from mmcore.data.transforms import views
from mmcore.data.transforms.augment import MAX_MAGNITUDE, erased, rand_augment
from mmcore.data.transforms.images import to_pixels
from mmcore.image_recipe import ImageRecipe
from mmcore.losses import global_ratio
from mmcore.ops import distillation_loss, require
from mmcore.parts.image_tower import ImagePool, PooledTower
from mmcore.recipe import Claim, Classifies, Proof, Runner, Step, VisionAssets
from mmcore.runs import load_weights
from mmcore.settings import once
from mmcore.systems.vit.mixing import draw
from mmcore.systems.vit.model import ClassifierConfig, ViTClassifier
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.start import given_tower, named_for, resized
from mmcore.systems.vit.teacher import TEACHER, Teacher, check_teacher
from mmcore.systems.vit.weights import save_classifier
from mmcore.tasks.classification import figure
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

# DeiT's (arXiv 2012.12877): 5e-4 a 512 of the batch of 1,024, five epochs of warm-up
_published = partial(
    OptimConfig, lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, beta2=0.999, eps=1e-8, weight_decay=0.05, warmup=6_250
)
_DROP_PATH, _ALPHA, _TEMPERATURE = 0.1, 0.7, 4.0


class Labelled(NamedTuple):
    """Images uint8 [3, S, S] or [B, 3, S, S], and their classes, a number or int64 [B]."""

    images: Tensor
    labels: Any


@dataclass(frozen=True)
class Vit(ImageRecipe):
    """Train a ViT (arXiv 2010.11929) to tell classes apart, as DeiT was (arXiv 2012.12877), from nothing or from a
    tower that another recipe trained."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=300))
    optim: OptimConfig = field(default_factory=_published)
    vision: str | None = field(default=None, metadata=once)
    """A tower with its weights in place of --model's: a run that has one, such as of simclr, mae or clip; a folder of
    transformers (CLIP, SigLIP, ViT) or open_clip; a file or folder of timm's vit_* weights."""
    image_size: int | None = None
    """Pixels a side, a multiple of the patches'; the positions of --vision are interpolated; None = those of the
    tower."""
    pooling: ImagePool | None = None
    """What of the tower the classes are read from: class, its class token; mean, the mean of the patches; fc_norm, that
    mean before the final norm (MAE's fine-tuning); head, SigLIP's; None = as --vision is read by others, else class."""
    lock_image: bool = False
    """Keep the tower of --vision as it is: a linear head learns alone."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    mixup: float = 0.8
    """Mix pairs of images, with a share of Beta(a, a); 0 = off."""
    cutmix: float = 1.0
    """As --mixup, of a rectangle cut from one of them; with both, either has even odds."""
    rand_augment: float | None = 9.0
    """Magnitude of RandAugment, from 0 to 10; None = off."""
    erase: float = 0.25
    """Probability that a rectangle of a training image is noise."""
    drop_path: float | None = None
    """Share of the samples that a residual of the last layer is left out of, less in those before it; None = 0.1."""
    teacher: Path | None = None
    """A run of a classifier of the same classes, whose logits are learned too."""
    alpha: float | None = None
    """Share of the teacher's logits in the loss, the rest is the labels'; None = 0.7."""
    temperature: float | None = None
    """That teacher and student are compared at; None = 4."""

    shapes = shapes(lambda vision, is_tiny: ClassifierConfig(vision), "ViT-Ti-16", "ViT-S-16", "ViT-B-16", "ViT-L-16")
    kind = ViTClassifier
    published_views = views.CLASSIFIED
    tasks = ("classification",)
    formats = ("hf", "timm")

    def assets(self, data: PairData) -> VisionAssets:
        super().assets(data)
        self._check()
        given = None if self.vision is None else given_tower(self.vision, self.image_size, self._drop_path)
        vision: Any = self._own_vision() if given is None else given.config
        pool = self.pooling or ("class" if given is None else given.pool)
        shape = ClassifierConfig(vision, checked_classes(data), pool)
        with torch.device("meta"):
            self.kind(shape)  # a tower that cannot be read so
        if self.teacher is not None:
            check_teacher(self.teacher, shape)
        frozen = named_for(given, pool) if given is not None and self.lock_image else {}
        return VisionAssets(shape, frozen=frozen)

    def _check(self) -> None:
        """Raises a ValueError for flags out of range, or that have no effect."""
        for name in ("label_smoothing", "erase", "drop_path", "alpha"):
            value, flag = getattr(self, name), name.replace("_", "-")
            is_share = value is None or 0 <= value < 1 or (value == 1 and name in ("erase", "alpha"))
            require("vit", is_share, "--{} must be from 0, below 1, got {}", flag, value)
        for name in ("mixup", "cutmix"):
            require("vit", getattr(self, name) >= 0, "--{} must be at least 0, got {}", name, getattr(self, name))
        magnitude = self.rand_augment
        fits = magnitude is None or 0 <= magnitude <= MAX_MAGNITUDE
        require("vit", fits, "--rand-augment must be from 0 to {}, got {}", MAX_MAGNITUDE, magnitude)
        fits = self.temperature is None or self.temperature > 0
        require("vit", fits, "--temperature must be above 0, got {}", self.temperature)
        for flag, value in (("alpha", self.alpha), ("temperature", self.temperature)):
            has_effect = value is None or self.teacher is not None
            require("vit", has_effect, "--{} has no effect without --teacher, got {}", flag, value)
        is_shaped = self.vision is None or self.model == "tiny"
        require("vit", is_shaped, "--model must be left out with --vision, got {}", self.model)
        if self.lock_image and self.vision is None:
            raise ValueError("--lock-image must come with --vision: a locked tower of random weights shows nothing")
        has_effect = self.drop_path is None or not self.lock_image
        require("vit", has_effect, "--drop-path has no effect with --lock-image, got {}", self.drop_path)

    @property
    def _drop_path(self) -> float:
        return _DROP_PATH if self.drop_path is None else self.drop_path

    def _own_vision(self) -> Any:
        return resized(replace(self.shapes[self.model].vision, drop_path=self._drop_path), self.image_size)

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> VisionAssets:
        return replace(super().load_assets(folder, saved, frozen, purpose), frozen=frozen)

    def build(self, assets: VisionAssets) -> ViTClassifier:
        model: ViTClassifier = super().build(assets)
        load_weights(model, assets.frozen, is_whole=False)
        for name, p in model.named_parameters():
            p.requires_grad_(name not in assets.frozen)
        model.is_locked = self.lock_image
        return model.train()

    def initial(self, assets: VisionAssets, model: ViTClassifier) -> Mapping[str, Tensor]:
        if self.vision is None or self.lock_image:
            return {}
        return named_for(given_tower(self.vision, self.image_size, self._drop_path), assets.shape.pool)

    def shown(self, data: PairData, assets: VisionAssets) -> list[str]:
        names = assets.shape.classes
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return [f"{len(names)} classes ({some}), read from: {assets.shape.pool}"]

    def sample(self, assets: VisionAssets, record: Any, rng: np.random.Generator) -> Labelled:  # pyright: ignore[reportIncompatibleMethodOverride]
        pixels = self.view(record, assets.preprocess, rng, 0)
        if self.rand_augment is not None:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            pixels = to_pixels(rand_augment(image, self.rand_augment, rng))
        if rng.random() < self.erase:
            pixels = erased(pixels, rng, assets.preprocess.mean, assets.preprocess.std)
        return Labelled(pixels, record.label(""))  # a class, whatever the caption

    def collate(self, assets: VisionAssets, samples: list[Labelled]) -> Labelled:
        return default_collate(samples)

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        return {} if self.teacher is None else {TEACHER: Teacher(self.teacher, model.device)}

    def loss(self, model: Runner, batch: Labelled, step: Step) -> dict[str, Tensor]:
        images, labels = batch
        num = torch.tensor(len(labels), device=images.device)
        mix = draw(step.rng, len(labels), images.shape[-1], self.mixup, self.cutmix)
        parts = [(labels, 1.0)]
        if mix is not None:
            images, parts = mix.images(images), [(labels, mix.share), (mix.partners(labels), 1 - mix.share)]
        logits = model(images)
        smooth: Any = {"label_smoothing": self.label_smoothing, "reduction": "sum"}
        hard = global_ratio(torch.stack([w * F.cross_entropy(logits, y, **smooth) for y, w in parts]).sum(), num)
        teacher = step.companions.get(TEACHER)
        if teacher is None:
            return {"loss": hard}
        alpha = _ALPHA if self.alpha is None else self.alpha
        t = _TEMPERATURE if self.temperature is None else self.temperature
        soft = t**2 * global_ratio(distillation_loss(logits, teacher(images), t, t, reduction="sum"), num)
        return {"loss": alpha * soft + (1 - alpha) * hard, "labels": hard, "distillation": soft}

    def classifies(self, assets: VisionAssets, model: Runner, device: torch.device) -> Classifies:
        return Classifies(assets.preprocess, assets.shape.classes, model)

    def pooled_tower(self, assets: VisionAssets, model: ViTClassifier) -> PooledTower:
        return model.pooled_tower()

    def image_tower(self, assets: VisionAssets, model: ViTClassifier) -> Any:
        return model.image_tower()

    def export(self, assets: VisionAssets, model: ViTClassifier, folder: Path, format: str) -> None:
        save_classifier(model, folder, format)


def checked_classes(data: PairData) -> tuple[str, ...]:
    """The names of the classes of data, in the order of their numbers; a ValueError where it has none, fewer than two,
    or holds out images of a class that it does not train on."""
    names, known = data.class_names, data.classes()
    has_classes = names is not None and known is not None
    require("vit", has_classes, "--data must have classes, such as a folder of them, or digits, got {!r}", data.name)
    assert names is not None and known is not None
    seen = set(known)
    require(
        "vit", len(seen) > 1, "--data must have images of two or more classes, got {} in {!r}", len(seen), data.name
    )
    held_out = () if data.val is None or data.val.labels is None else data.val.labels
    alone = sorted(set(held_out) - seen)
    what = "held-out images must be of classes that are trained on, got {} of {!r} alone"
    require("vit", not alone, what, len(alone), *(names[i] for i in alone[:1]))
    return tuple(names)


_FLAGS = (
    "--data scattered --views source --mixup 0 --cutmix 0 --rand-augment None --erase 0 --drop-path 0 "
    "--batch-size 128 --steps 300 --lr 2e-3 --warmup 20"
)
_ACCURACY = "accuracy (held-out)", figure(1)
PROOF = Proof(
    [("vit", _FLAGS)],
    [Claim(*_ACCURACY, floor=0.75, ceiling=0.2, control="untrained"), Claim(*_ACCURACY, floor=0.75, ceiling=0.2)],
)

# each training picture has the label of another: what is learned is the teacher's
_BLIND = f"{_FLAGS} --shuffle-pictures"
DISTILLATION = Proof(
    [("vit", _FLAGS), ("vit", f"{_BLIND} --teacher {{0}} --alpha 1")],
    [Claim("accuracy (held-out) of a student of wrong labels", figure(1), floor=0.65, ceiling=0.2, control="without")],
    without=[("vit", _BLIND)],
)
