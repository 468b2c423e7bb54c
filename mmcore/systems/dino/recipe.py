"""DINO's recipe, and what iBOT and DINOv2 have of it: a step of a student and its momentum teacher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.data import PairData, Preprocess
from mmcore.data.transforms import views
from mmcore.data.transforms.views import seen
from mmcore.image_recipe import CLASS_TOKEN, ImageRecipe
from mmcore.losses import sinkhorn_knopp, view_distillation_loss
from mmcore.nn import MomentumEncoder
from mmcore.ops import require
from mmcore.parts.heads import Centre
from mmcore.parts.vit import VisionConfig
from mmcore.recipe import Claim, Proof, Runner, Step, VisionAssets
from mmcore.systems.dino.model import DINOConfig, DINOModel, Outputs
from mmcore.systems.vit.shapes import shapes
from mmcore.systems.vit.weights import save_vit
from mmcore.tasks.features import figure
from mmcore.tasks.projection import DEVIATION, ENTROPY_OF_MEAN
from mmcore.train.optim import OptimConfig, Rule
from mmcore.train.schedules import cosine, linear

NUM_LARGE = 2
_PUBLISHED_SIDE = 224

# lr 5e-4 a 256 of the batch of 1,024; 10 epochs of warm-up
published_optim = partial(
    OptimConfig,
    lr=2e-3,
    min_lr=1e-6,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.04,
    weight_decay_end=0.4,
    warmup=12_510,
    clip_each=3.0,
)


class Crops(NamedTuple):
    """Views of images, of each size view by view: uint8 [2, B, 3, S, S] and [L, B, 3, s, s], L from 0; and of masked
    modelling the large ones' masked patches, bool [2, B, P], their numbers over that, int64 [N], and one over how many
    the view has, float32 [N]."""

    large: Tensor
    small: Tensor
    masked: Tensor | None = None
    places: Tensor | None = None
    shares: Tensor | None = None


class Targets(NamedTuple):
    """Of a teacher: logits, and the temperature and the centre of their softmax."""

    logits: Tensor
    temperature: float
    centre: Tensor | None


@dataclass(frozen=True)
class SelfDistillation(ImageRecipe):
    """Mixin: a student learns of views what its moving average, the teacher, makes of the large ones among them."""

    optim: OptimConfig = field(default_factory=published_optim)
    local_crops: int | None = None
    """Small views of an image, which the student alone sees; None = as published."""
    view_scale: float | None = None
    """Least share of an image's area that a large view shows, and the most that a small one does; None = as
    published."""
    student_temperature: float = 0.1
    """Temperature of the student's outputs."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's outputs after their warm-up: what sharpens them."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's outputs at the first step."""
    teacher_temperature_warmup: int = 37_530
    """Steps in which it goes from the one to the other, along a line."""
    teacher_momentum: float = 0.996
    """Momentum of the teacher's weights at the first step."""
    teacher_momentum_end: float = 1.0
    """Momentum of the teacher's weights at the end of the run, along a cosine."""
    centre_momentum: float = 0.9
    """Momentum of the centre that is taken off the teacher's outputs."""
    freeze_last_layer: int = 1_251
    """Steps at the beginning in which the last layer of the head stays as it is (an epoch, as published)."""

    kind = DINOModel
    tasks = ("features", "projection")
    stages = (0, 1, 2)
    training_only = ("head.", "patch_head.", "visual.mask_token")
    measured = "teacher"
    pool = "class"
    centres_patches: ClassVar[bool] = False
    """Whether all patches of a teacher's views go through its head, for their centre."""

    @property
    def centres(self) -> str:
        """How the teacher's outputs are kept from falling into few: "centre", "sinkhorn-knopp" or "none"."""
        return "centre"

    @property
    def shares_at(self) -> float:
        """The temperature of what `projects` gives, as shares of the prototypes."""
        return self.student_temperature

    @property
    def num_small(self) -> int:
        return len(self.published_views) - NUM_LARGE if self.local_crops is None else self.local_crops

    @property
    def rules(self) -> tuple[Rule, ...]:
        heads = ("head.last_layer", "patch_head.last_layer")
        return tuple(Rule(name, frozen_until=self.freeze_last_layer) for name in heads)

    def assets(self, data: PairData) -> VisionAssets:
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            value = getattr(self, name)
            require(self.name, value > 0, "--{} must be above 0, got {}", name.replace("_", "-"), value)
        for name in ("teacher_momentum", "teacher_momentum_end", "centre_momentum"):
            value = getattr(self, name)
            require(self.name, 0 <= value <= 1, "--{} must be in [0, 1], got {}", name.replace("_", "-"), value)
        for name in ("freeze_last_layer", "teacher_temperature_warmup", "local_crops"):
            value = getattr(self, name) or 0
            require(self.name, value >= 0, "--{} must be at least 0, got {}", name.replace("_", "-"), value)
        return super().assets(data)

    # data

    def small_size(self, vision: VisionConfig) -> int:
        """Pixels of a small view, as many for the tower's size as published ones have for theirs, in whole patches."""
        asked = self.published_views[-1].size * vision.image_size / _PUBLISHED_SIDE
        return max(1, round(asked / vision.patch_size)) * vision.patch_size

    def view(self, record: Any, preprocess: Preprocess, rng: np.random.Generator, number: int) -> Tensor:
        """Of those that are published, the small ones behind the large, of the size that `preprocess` has."""
        is_large = number < NUM_LARGE
        published = self.published_views[min(number, NUM_LARGE)]
        if self.view_flip is not None:
            published = replace(published, flip=self.view_flip)
        if self.view_scale is not None:
            least, bound = published.scale[0], self.view_scale
            published = replace(published, scale=(bound, 1.0) if is_large else (min(least, bound), bound))
        return seen(record, preprocess, rng, published if self.views == "published" else None)

    def sample(self, assets: VisionAssets, record: Any, rng: np.random.Generator) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = assets.preprocess
        large = [self.view(record, whole, rng, i) for i in range(NUM_LARGE)]
        part = replace(whole, size=self.small_size(assets.shape.vision))
        small = [self.view(record, part, rng, NUM_LARGE + i) for i in range(self.num_small)]
        return torch.stack(large), torch.stack(small) if small else large[0].new_empty(0, 3, part.size, part.size)

    def collate(self, assets: VisionAssets, samples: list[tuple[Tensor, ...]]) -> Crops:
        large, small, *_ = (torch.stack(x, 1) for x in zip(*samples, strict=True))
        return Crops(large, small)

    # steps

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        teacher, config = MomentumEncoder(model.deepspeed, self.teacher_momentum), model.module.config
        teacher.teacher.eval()  # residuals are never left out there
        found: dict[str, nn.Module] = {"teacher": teacher}
        if self.centres == "centre":
            found["centre"] = Centre(config.num_prototypes, self.centre_momentum).to(model.device)
            if self.has_patches:
                found["patch_centre"] = Centre(config.num_of_patches, self.centre_momentum).to(model.device)
        return found

    @property
    def has_patches(self) -> bool:
        """Whether patches go through the head."""
        return False

    def loss(self, model: Runner, batch: Crops, step: Step) -> dict[str, Tensor]:
        student: Outputs = model(batch.large, batch.small, batch.masked, batch.places)
        teacher = self.teach(model, batch, student, step)
        losses, weights = self.objective(student, teacher, batch, step), self.weights(step)
        return {"loss": torch.stack([weights[name] * x for name, x in losses.items()]).sum(), **losses}

    @torch.no_grad()
    def teach(self, model: Runner, batch: Crops, student: Outputs, step: Step) -> Outputs:
        """What the teacher makes of whole large views, and of the patches that the student does not see; all of them
        where their centre asks for it. A plan, which has no teacher, counts the student again."""
        places = batch.places
        is_all = places is not None and self.centres == "centre" and self.centres_patches
        if places is not None and is_all:
            places = torch.arange(student.states.shape[:2].numel(), device=places.device)
        # a companion is outside of the engine and of its autocast
        is_low = student.large.dtype == torch.bfloat16
        with torch.autocast(student.large.device.type, dtype=torch.bfloat16, enabled=is_low):
            found: Outputs = step.companions.get("teacher", model)(batch.large, places=places)
        for name, rows in (("centre", found.large.flatten(0, 1)), ("patch_centre", found.patches)):
            centre = step.companions.get(name)
            if isinstance(centre, Centre) and rows is not None:
                centre.add(rows)
        if found.patches is not None and is_all and batch.places is not None:
            found = found._replace(patches=found.patches[batch.places])
        return found

    def targets(self, logits: Tensor, name: str, step: Step) -> Targets:
        """What logits of the teacher, [N, K], are compared by: less the centre of that name, or assigned evenly."""
        start, end = self.teacher_temperature_start, self.teacher_temperature
        temperature = linear(start, end, self.teacher_temperature_warmup)(step.number)
        if self.centres == "sinkhorn-knopp":
            return Targets(sinkhorn_knopp(logits, temperature), 1.0, None)
        centre = step.companions.get(name)
        return Targets(logits, temperature, centre.mean if isinstance(centre, Centre) else None)

    def objective(self, student: Outputs, teacher: Outputs, batch: Crops, step: Step) -> dict[str, Tensor]:
        """Losses by their names in `weights`."""
        logits, temperature, centre = self.targets(teacher.large.flatten(0, 1), "centre", step)
        rows = [*student.large, *student.small]
        compared = self.student_temperature, temperature, centre
        return {"views": view_distillation_loss(rows, logits.chunk(NUM_LARGE), *compared)}

    def weights(self, step: Step) -> Mapping[str, float]:
        """Of the losses in their sum."""
        return {"views": 1.0}

    def after_step(self, model: Any, step: Step) -> None:
        teacher = step.companions["teacher"]
        assert isinstance(teacher, MomentumEncoder)
        teacher.ema.decay = cosine(self.teacher_momentum, self.teacher_momentum_end, step.total)(step.number)
        teacher.update()
        for name in ("centre", "patch_centre"):
            centre = step.companions.get(name)
            if isinstance(centre, Centre):
                centre.update()

    # what follows

    def projects(self, assets: VisionAssets, model: Runner, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images[None]).large[0]

    def export(self, assets: VisionAssets, model: DINOModel, folder: Any, format: str) -> None:
        save_vit(self.image_tower(assets, model), folder)


def shape_of(vision: VisionConfig, is_tiny: bool, **options: Any) -> DINOConfig:
    """Of DINO and iBOT: the norms of the last layer learn in towers up to S."""
    if is_tiny:
        return DINOConfig(replace(vision, drop_path=0.0), 256, 64, 64, init_std=None)
    return DINOConfig(vision, learns_norm=vision.width < 768, **options)


@dataclass(frozen=True)
class Dino(SelfDistillation):
    """Train DINO (arXiv 2104.14294) on the images of any source: what a momentum teacher makes of large views of an
    image is learned from all its other views."""

    centring: Literal["centre", "none"] = "centre"
    """centre = the running mean of the teacher's outputs is taken off them; none = collapse, for comparison."""

    shapes = shapes(shape_of, "ViT-S-16", "ViT-S-8", "ViT-B-16", "ViT-B-8", drop_path=0.1)
    published_views = views.DINO

    @property
    def centres(self) -> str:
        return self.centring


_FLAGS = (
    "--data scattered --views source --local-crops 0 --batch-size 128 --steps {steps} --lr 1e-3 --min-lr 1e-5 "
    "--warmup 60 --teacher-momentum 0.98 --freeze-last-layer 0 --weight-decay-end 0.04 "
)
FLAGS = _FLAGS.format(steps=600) + "--teacher-temperature 0.04"
"""Of proofs of iBOT and DINOv2 too."""
PROOF = Proof(
    [("dino", FLAGS)],
    [
        Claim(
            "linear probe accuracy of frozen features (held-out)",
            figure("linear probe accuracy", CLASS_TOKEN),
            floor=0.48,
            control="untrained",
        ),
        Claim("deviation of outputs (held-out)", DEVIATION, 0.5, 0.1, control="without"),
        Claim("entropy of the mean output over ln K (held-out)", ENTROPY_OF_MEAN, 0.8, control=None),
    ],
    without=[
        ("dino", _FLAGS.format(steps=150) + "--centring none --teacher-temperature 0.1 --teacher-temperature-start 0.1")
    ],
)
