"""The recipe of masked image modelling, and its systems: SimMIM, MaskFeat, BEiT, BEiT v2, MVP, EVA, data2vec."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.data import PairData
from mmcore.data.transforms import views
from mmcore.data.transforms.images import normalized
from mmcore.image_recipe import PATCH_MEAN
from mmcore.losses import global_ratio
from mmcore.nn import MomentumEncoder
from mmcore.ops import require
from mmcore.parts.pixels import PixelTargets
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.runs import is_run
from mmcore.settings import flag, once
from mmcore.systems.mim import shapes, targets, tokenizers
from mmcore.systems.mim.hog import VALUES_OF_CELL, hog
from mmcore.systems.mim.model import Mim, MimConfig
from mmcore.systems.mim.sources import MimAssets, Sourced, WithTeacher, resized
from mmcore.systems.mim.vqkd import load_tokenizer
from mmcore.systems.mim.weights import read_start, save_mim
from mmcore.tasks.features import figure
from mmcore.tasks.reconstruction import ACCURACY, OVER_FREQUENT, OVER_MEAN, Reconstructs
from mmcore.train.config import EngineConfig, RunConfig
from mmcore.train.optim import OptimConfig

_adamw = partial(OptimConfig, beta2=0.999, eps=1e-8, weight_decay=0.05, warmup=6_250)
_clipped = partial(EngineConfig, grad_clip=3.0)


@dataclass(frozen=True)
class MimRecipe(Sourced):
    """Mixin: some patches of an image are masked, and a head predicts something of them; what that is, by which loss,
    stands in `targets.ROWS`, how the tower is made and masked in `shapes`."""

    mask_ratio: float | None = None
    """Share of the patches that are masked; None = as published for --model."""
    init: Path | None = field(default=None, metadata=once)
    """Weights to start from: a file of BEiT, BEiT v2, EVA or SimMIM as published, a run of such a recipe, a folder of
    transformers' BEiT, data2vec or ViT."""

    row: ClassVar[targets.Row]
    kind = Mim
    pool = "mean"
    tasks = ("reconstruction",)
    training_only = ("head.", "visual.mask_token", "class_branch.")

    def shape(self) -> MimConfig:
        shape: MimConfig = self.shapes[self.model]
        if self.mask_ratio is not None:
            shape = replace(shape, mask=replace(shape.mask, ratio=self.mask_ratio))
        try:
            shape.mask.draw(shape.side, np.random.default_rng(0))
        except ValueError as error:
            raise ValueError(f"--mask-ratio must leave and mask patches of {self.model}: {error}") from None
        return shape

    def sample(self, assets: MimAssets, record: Any, rng: np.random.Generator) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        image, *seen = self.both_views(assets, record, rng)
        return image, _drawn(assets.shape, rng), *seen

    def assets(self, data: PairData) -> MimAssets:
        assets = super().assets(data)
        if self.init is not None:
            read_start(self.name, self.init, Mim(assets.shape))
        return assets

    def initial(self, assets: MimAssets, model: Mim) -> Mapping[str, Tensor]:
        return {} if self.init is None else read_start(self.name, self.init, model)

    def collate(self, assets: MimAssets, samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Images, masks, the places of masked patches, and the images as a tokenizer or teacher wants them, where that
        differs."""
        images, masked, *seen = (torch.stack(x) for x in zip(*samples, strict=True))
        return images, masked, masked.flatten().nonzero()[:, 0], *seen

    def weight(self, batch: tuple[Tensor, ...]) -> float:
        return len(batch[2])

    def build(self, assets: MimAssets) -> Mim:  # pyright: ignore[reportIncompatibleMethodOverride]
        model = super().build(assets)
        if model.class_branch is not None:
            model.class_branch.activation_checkpointing = self.activation_checkpointing
        model.targets = partial(self.target, assets)
        return model

    def target(self, assets: MimAssets, images: Tensor) -> Tensor:
        """What is predicted of images as `MimAssets.seen` has them: [B, P, ...]."""
        return assets.made(images.device)(images)

    def loss(self, model: Runner, batch: tuple[Tensor, ...], step: Step) -> dict[str, Tensor]:
        predictions, target = model(*batch)
        return self.losses(predictions, target)

    def losses(self, predictions: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """The mean over the masked patches of all ranks, and where there are two predictions each one's."""
        count, of_patch = torch.tensor(len(target), device=target.device), targets.LOSSES[self.row.loss]
        names = ("patches", "class branch")
        found = {
            name: global_ratio(of_patch(x, target).sum(), count) for name, x in zip(names, predictions, strict=False)
        }
        return {"loss": torch.stack(list(found.values())).sum(), **(found if len(found) > 1 else {})}

    def reconstructs(self, assets: MimAssets, model: Runner, device: torch.device) -> Reconstructs:
        def target(images: Tensor) -> Tensor:
            return self.target(assets, resized(images, assets.seen.size))

        draw = self.pixels(assets).draw if self.row.target == "pixels" else None
        return Reconstructs(assets.preprocess, partial(_drawn, assets.shape), target, model, draw, self.row.score)

    def pixels(self, assets: MimAssets) -> PixelTargets:
        """As they are."""
        return PixelTargets(assets.shape.vision, norm=False)

    def export(self, assets: MimAssets, model: Mim, folder: Path, format: str) -> None:
        kind = "data2vec-vision" if self.row.target == "states" else "beit"
        save_mim(model, folder, predicts=self.row.target, model_type=kind)


def _drawn(shape: MimConfig, rng: np.random.Generator) -> Tensor:
    return shape.mask.draw(shape.side, rng)


@dataclass(frozen=True)
class SimMim(MimRecipe):
    """Train SimMIM (arXiv 2111.09886) on the images of any source: the pixels of masked cells are predicted."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=800))
    optim: OptimConfig = field(
        default_factory=partial(_adamw, lr=4e-4, warmup_lr=5e-7, schedule="multistep", milestones=(0.875,))
    )
    engine: EngineConfig = field(default_factory=partial(EngineConfig, grad_clip=5.0))

    row = targets.ROWS["simmim"]
    shapes = shapes.SIMMIM
    published_views = views.SIMMIM

    def target(self, assets: MimAssets, images: Tensor) -> Tensor:
        return self.pixels(assets)(images)


@dataclass(frozen=True)
class MaskFeat(MimRecipe):
    """Train MaskFeat (arXiv 2112.09133) on the images of any source: histograms of oriented gradients of masked patches
    are predicted."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=300))
    optim: OptimConfig = field(default_factory=partial(_adamw, lr=1.6e-3, warmup_lr=1e-6, warmup=18_750))

    row = targets.ROWS["maskfeat"]
    shapes = shapes.MASKFEAT
    published_views = views.MASKFEAT

    def target(self, assets: MimAssets, images: Tensor) -> Tensor:
        vision = assets.shape.vision
        pixels = normalized(images, vision.image_mean, vision.image_std)
        cells_of_side = round((assets.shape.outputs / VALUES_OF_CELL) ** 0.5)
        return hog(pixels, vision.patch_size, vision.patch_size // cells_of_side)


@dataclass(frozen=True)
class OnTokens(MimRecipe):
    """Mixin: tokens of masked patches are predicted."""

    tokenizer: str | None = field(default=None, metadata=once)
    """What makes tokens of patches: kmeans, also None = the nearest of --num-tokens patches of pixels, which are fitted
    to the training images first, enough for digits; a run of vqkd; or a folder of transformers' FlavaImageCodebook,
    which is DALL-E's encoder."""
    num_tokens: int | None = None
    """Tokens of kmeans; None = as --model has it."""

    def with_source(self, data: PairData, shape: MimConfig) -> MimAssets:
        path = Path(self.tokenizer or "kmeans")
        if self.tokenizer in (None, "kmeans"):
            count, vision = shape.outputs if self.num_tokens is None else self.num_tokens, shape.vision
            centres = tokenizers.fit_patches(data, vision.preprocess, vision.patch_size, count, self.run.seed)
            return MimAssets(replace(shape, outputs=count), {"kind": "kmeans"}, frozen={"centres": centres})
        none = self.num_tokens is None
        require(self.name, none, "--num-tokens has no effect without --tokenizer kmeans, got {}", self.num_tokens)
        if is_run(path):
            saved, state = load_tokenizer(self.name, path, shape.side)
            source = {"kind": "vqkd", "shape": saved}
            return MimAssets(replace(shape, outputs=saved["num_tokens"]), source, frozen=state)
        what = "--tokenizer must be kmeans, a run of vqkd or a folder, got {!r}, which does not exist"
        require(self.name, path.is_dir(), what, self.tokenizer)
        settings, state = tokenizers.load_dalle(path)
        source = {"kind": "dalle", "settings": settings}
        return MimAssets(replace(shape, outputs=settings["vocab_size"]), source, frozen=state)

    def target(self, assets: MimAssets, images: Tensor) -> Tensor:
        return assets.made(images.device).indices(images)


@dataclass(frozen=True)
class Beit(OnTokens):
    """Train BEiT (arXiv 2106.08254) on the images of any source: tokens of masked patches are predicted."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=800))
    optim: OptimConfig = field(default_factory=partial(_adamw, lr=1.5e-3, min_lr=1e-5))
    engine: EngineConfig = field(default_factory=_clipped)

    row = targets.ROWS["beit"]
    shapes = shapes.BEIT
    published_views = views.BEIT


@dataclass(frozen=True)
class Beit2(Beit):
    """Train BEiT v2 (arXiv 2208.06366) on the images of any source: VQ-KD's tokens (mmcore train vqkd) of masked
    patches are predicted, twice."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=1600))

    row = targets.ROWS["beit2"]
    shapes = shapes.BEIT2


@dataclass(frozen=True)
class Mvp(WithTeacher, MimRecipe):
    """Train MVP (arXiv 2203.05175) on the images of any source: a CLIP's features of masked patches are predicted."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=300))
    optim: OptimConfig = field(default_factory=partial(_adamw, lr=1.5e-3, beta2=0.98, min_lr=1e-5))
    engine: EngineConfig = field(default_factory=_clipped)

    row = targets.ROWS["mvp"]
    shapes = shapes.MVP
    published_views = views.BEIT


@dataclass(frozen=True)
class Eva(WithTeacher, MimRecipe):
    """Train EVA (arXiv 2211.07636) on the images of any source: a CLIP's features of masked patches are predicted."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=150))
    optim: OptimConfig = field(
        default_factory=partial(_adamw, lr=1e-3, beta2=0.98, eps=1e-6, min_lr=1e-5, warmup=14_400)
    )
    engine: EngineConfig = field(default_factory=_clipped)

    row = targets.ROWS["eva"]
    shapes = shapes.EVA
    published_views = views.MAE


@dataclass(frozen=True)
class Data2Vec(MimRecipe):
    """Train data2vec (arXiv 2202.03555) on the images of any source: what a momentum teacher's last layers make of
    masked patches is predicted."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=800))
    optim: OptimConfig = field(default_factory=partial(_adamw, lr=2e-3))
    engine: EngineConfig = field(default_factory=_clipped)
    teacher_momentum: float = 0.9998
    """The teacher's decay, which it rises to."""
    teacher_momentum_start: float = 0.999
    """The teacher's decay at first."""
    teacher_momentum_steps: int = 30_000
    """Steps that it rises for."""

    row = targets.ROWS["data2vec"]
    shapes = shapes.DATA2VEC
    published_views = views.BEIT
    tasks = ("features", "reconstruction")
    stages = (0, 1, 2)

    def with_source(self, data: PairData, shape: MimConfig) -> MimAssets:
        for name in ("teacher_momentum", "teacher_momentum_start"):
            value = getattr(self, name)
            require("data2vec", 0 <= value <= 1, "{} must be in [0, 1], got {}", flag(name), value)
        num = self.teacher_momentum_steps
        require("data2vec", num >= 1, "--teacher-momentum-steps must be at least 1, got {}", num)
        return MimAssets(shape)

    def build(self, assets: MimAssets) -> Mim:
        model = super().build(assets)
        model.targets = None
        return model

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        first, rise = self.teacher_momentum_start, self.teacher_momentum - self.teacher_momentum_start
        teacher = MomentumEncoder(model.deepspeed, lambda t: first + rise * min(1.0, t / self.teacher_momentum_steps))
        teacher.teacher.eval()
        return {"teacher": teacher}

    def loss(self, model: Runner, batch: tuple[Tensor, ...], step: Step) -> dict[str, Tensor]:
        target = step.companions["teacher"](batch[0], teaches=True).flatten(0, 1)[batch[2]]
        return self.losses(model(*batch)[0], target)

    def after_step(self, model: Any, step: Step) -> None:
        step.companions["teacher"].update()  # pyright: ignore[reportCallIssue]

    def reconstructs(self, assets: MimAssets, model: Runner, device: torch.device) -> Reconstructs:
        """Against what the model itself makes of whole images: its teacher is no part of it."""
        target = partial(model, teaches=True)
        return Reconstructs(assets.preprocess, partial(_drawn, assets.shape), target, model, None, self.row.score)


_DIGITS = "--data digits --views source --batch-size 128 --weight-decay 0.05 --warmup 20"
# whole images, as they are measured: a place's tokens are no longer those of its neighbours
_WHOLE = _DIGITS.replace("--views source", "--view-scale 1 --view-flip 0")
SIMMIM = Proof(
    [("simmim", f"{_DIGITS} --steps 600 --lr 3e-3 --schedule cosine --milestones None --grad-clip 1")],
    [Claim("R^2 of masked patches (held-out)", "R^2 of masked patches", 0.5, ceiling=0.0)],
)
MASKFEAT = Proof(
    [("maskfeat", f"{_WHOLE} --steps 1400 --lr 3e-3")],
    [Claim("R^2 of masked histograms (held-out)", "R^2 of masked patches", 0.3, ceiling=0.0)],
)
_tokens = [
    Claim("accuracy of masked tokens (held-out)", ACCURACY, 0.6, ceiling=0.25),
    Claim("accuracy above each place's most frequent token (held-out)", OVER_FREQUENT, 0.35, ceiling=0.0),
]
BEIT = Proof([("beit", f"{_WHOLE} --steps 900 --lr 3e-3")], _tokens)
_CLIP = ("clip", "--data digits --model tiny --lr 1e-3 --epochs 30")
_features = [Claim("cosine above each place's mean feature (held-out)", OVER_MEAN, 0.1, ceiling=0.0)]
MVP = Proof([_CLIP, ("mvp", f"{_DIGITS} --teacher {{0}} --steps 400 --lr 3e-3")], _features)
EVA = Proof([_CLIP, ("eva", f"{_DIGITS} --teacher {{0}} --steps 400 --lr 3e-3")], _features)
BEIT2 = Proof(
    [
        _CLIP,
        ("vqkd", f"{_DIGITS} --teacher {{0}} --steps 200 --lr 2e-3"),
        ("beit2", f"{_DIGITS} --tokenizer {{1}} --steps 600 --lr 3e-3"),
    ],
    [Claim("accuracy above each place's most frequent token (held-out)", OVER_FREQUENT, 0.1, ceiling=0.0)],
)
DATA2VEC = Proof(
    [
        (
            "data2vec",
            "--data scattered --views source --batch-size 128 --steps 400 --lr 2e-3 --warmup 20 "
            "--teacher-momentum-steps 300 --teacher-momentum-start 0.98 --teacher-momentum 0.999",
        )
    ],
    [
        Claim(
            "linear probe accuracy of frozen features (held-out)",
            figure("linear probe accuracy", PATCH_MEAN),
            0.5,
            ceiling=0.5,
            control="untrained",
        )
    ],
)
