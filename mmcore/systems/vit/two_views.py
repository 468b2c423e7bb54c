"""What SimCLR, MoCo, MoCo v3, SimSiam and BYOL have in common: heads on a tower, two views of each image, a teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.data import PairData
from mmcore.image_recipe import ImageRecipe
from mmcore.nn import MomentumEncoder
from mmcore.ops import require
from mmcore.parts.heads import check_batch, projection_head
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.recipe import Runner, Step, VisionAssets
from mmcore.systems.vit.weights import save_vit
from mmcore.train import schedules


@dataclass(frozen=True)
class TwoViewConfig:
    """Shape of the tower, and of the heads by the width of each layer; `predictor` reads what `projector` makes."""

    vision: VisionConfig
    projector: tuple[int, ...]
    predictor: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fits = len(self.projector) > 0 and min((*self.projector, *self.predictor)) >= 1
        widths = self.projector, self.predictor
        require("TwoViewConfig", fits, "projector and predictor must have layers of at least 1, got {}", widths)


class TwoViewModel(nn.Module):
    """The tower, `visual`, read as one vector, and the heads, `projector` and, where there is one, `predictor`."""

    pool: ClassVar[Literal["class", "mean"]] = "mean"
    """Whether the heads read the class token or the mean of the patches."""
    has_joint_statistics: ClassVar[bool] = False
    """Whether the BatchNorms of the heads see all views as one batch, or each view apart."""

    def __init__(self, config: TwoViewConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        self.projector = self.head((config.vision.width, *config.projector))
        sizes = config.projector[-1], *config.predictor
        self.predictor = self.predicting_head(sizes) if config.predictor else None

    def head(self, sizes: Sequence[int]) -> nn.Sequential:
        """Makes `projector`."""
        return projection_head(sizes)

    def predicting_head(self, sizes: Sequence[int]) -> nn.Sequential:
        """Makes `predictor`."""
        return projection_head(sizes)

    def forward(self, images: Tensor, *, only_states: bool = False, only_projections: bool = False) -> Any:
        """Views [B, V, 3, S, S] to predictions, where there is a predictor, and projections, one [B, W] a view and
        kind, float32 or wider: (p1, p2, z1, z2). `only_projections`: without the former. `only_states`: images
        [B, 3, S, S] to the tower's states."""
        if only_states:
            return self.visual(images)
        states = self.visual(images.transpose(0, 1).flatten(0, 1))
        read = states[:, 0] if self.pool == "class" else states[:, self.config.vision.num_prefix :].mean(1)
        parts = (read,) if self.has_joint_statistics else read.chunk(images.shape[1])
        projected = [self.projector(x) for x in parts]
        found = projected
        if self.predictor is not None and not only_projections:
            found = [*map(self.predictor, projected), *projected]
        views = [x for part in found for x in part.chunk(images.shape[1] // len(parts))]
        return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in views)


@dataclass(frozen=True)
class TwoViews(ImageRecipe):
    """Mixin: trains a `TwoViewModel` on as many views of each image as are published."""

    pool = "mean"
    tasks = ("features", "projection")
    training_only = ("projector.", "predictor.")
    accumulates = False  # the statistics of BatchNorm, and the other images, are of the whole batch

    def assets(self, data: PairData) -> VisionAssets:
        check_batch(self.name, self.run.batch_size)
        temperature = getattr(self, "temperature", None)
        require(self.name, temperature is None or temperature > 0, "--temperature must be above 0, got {}", temperature)
        return super().assets(data)

    def sample(self, assets: VisionAssets, record: Any, rng: np.random.Generator) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.all_views(record, assets.preprocess, rng)

    def collate(self, assets: VisionAssets, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples)

    def projects(self, assets: VisionAssets, model: Runner, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images[:, None])[-1]

    def export(self, assets: VisionAssets, model: TwoViewModel, folder: Any, format: str) -> None:
        save_vit(self.image_tower(assets, model), folder)


@dataclass(frozen=True)
class Taught(TwoViews):
    """Mixin: what one view is compared with is made by the model's moving average."""

    teacher_momentum: float = 0.996
    """What of the teacher stays at a step."""

    stages = (0, 1, 2)
    ends_still: ClassVar[bool] = True
    """Whether that rises to 1 along a cosine over the run."""

    def assets(self, data: PairData) -> VisionAssets:
        momentum = self.teacher_momentum
        require(self.name, 0 <= momentum <= 1, "--teacher-momentum must be from 0 to 1, got {}", momentum)
        return super().assets(data)

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        return {"teacher": MomentumEncoder(model.deepspeed, self.teacher_momentum)}

    def after_step(self, model: Any, step: Step) -> None:
        teacher = step.companions["teacher"]
        assert isinstance(teacher, MomentumEncoder)
        if self.ends_still:
            teacher.ema.decay = schedules.cosine(self.teacher_momentum, 1.0, step.total)(step.number + 1)
        teacher.update()

    def taught(self, model: Runner, images: Tensor, step: Step) -> tuple[Tensor, ...]:
        """The teacher's projections of views, without a gradient; in a plan, which has no teacher, the model's own."""
        teacher, is_mixed = step.companions.get("teacher", model), getattr(model, "precision", None) == "amp_bf16"
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=is_mixed):
            return teacher(images, only_projections=True)
