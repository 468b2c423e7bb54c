"""SigLIP 2's recipe: images of any shape, the sigmoid loss of all pairs, and captions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from mmcore.data import PairData
from mmcore.data.transforms.images import random_crop
from mmcore.data.transforms.naflex import NaflexPreprocess, Patches
from mmcore.losses import global_ratio, global_sigmoid_loss
from mmcore.nn import MomentumEncoder
from mmcore.ops import require
from mmcore.parts.heads import Centre
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.settings import once
from mmcore.systems.siglip.recipe import Siglip
from mmcore.systems.siglip2.distiller import Targets, Views, num_patches
from mmcore.systems.siglip2.model import SigLIP2, Siglip2Config
from mmcore.systems.siglip2.shapes import siglip2_config
from mmcore.systems.siglip2.weights import TRAINING_ONLY, load_siglip2, save_siglip2
from mmcore.tasks.caption import NAMED
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.optim import Rule
from mmcore.two_towers import PairAssets

_CENTRE_MOMENTUM = 0.9
_PATCH_SHARE = 0.25


class Siglip2Sample(NamedTuple):
    """An image, its caption, and whether that is predicted from masks; views of self-distillation."""

    image: Patches
    caption: str
    parallel: bool
    views: Views | None


class Siglip2Batch(NamedTuple):
    """Images; tokens int64 [B, T], how many of each caption are learned, and which captions are predicted from masks;
    both None without a decoder. Views of self-distillation, and what gives their `Targets`, once they are learned."""

    images: Patches
    tokens: Tensor
    lengths: list[int] | None
    parallel: list[bool] | None
    views: Views | None = None
    teach: Callable[[Views], Targets] | None = None

    def part(self, rows: slice) -> "Siglip2Batch":
        lengths = None if self.lengths is None else self.lengths[rows]
        parallel = None if self.parallel is None else self.parallel[rows]
        views = None if self.views is None else self.views.part(rows, len(self.tokens))
        return Siglip2Batch(self.images.part(rows), self.tokens[rows], lengths, parallel, views, self.teach)


class NaflexAssets(PairAssets):
    """`PairAssets` of a model of images of any shape."""

    @property
    def preprocess(self) -> NaflexPreprocess:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.shape.preprocess


@dataclass(frozen=True)
class Siglip2(Siglip):
    """Train SigLIP 2 (arXiv 2502.14786) on image-caption pairs of any shape (NaFlex), with a captioning decoder."""

    model: str | None = field(default=None, metadata=once)
    """tiny, or tower and patch as published: B-16, L-16, So400m-16; None = that of --init, or tiny."""
    init: Path | None = field(default=None, metadata=once)
    """Weights and shape to start from: a folder of transformers with SigLIP 2 (safetensors)."""
    max_patches: tuple[int, ...] | None = None
    """Patches of an image at most; of several numbers each image draws one, and the largest is measured with. As
    published: 128 256 576 784 1024. None = as many as there are positions."""
    view_scale: float = 1.0
    """Least share of an image's area that it is trained on, in a crop of aspect 3/4 to 4/3; 1 = the whole image, as
    published."""
    captioning: bool = True
    """Learn to caption by a decoder on the image's states (LocCa)."""
    caption_weight: float = 1.0
    """Weight of the captions' loss."""
    parallel: float = 0.5
    """Share of the captions that are predicted all words at once, from masks."""
    distill_from: int | None = None
    """Step, from 0, from which on self-distillation and masked prediction of patches are learned too, of a large and
    eight small views of each image and a momentum teacher; published for squares at 80 % of the run. None = never."""
    distill_weight: float = 1.0
    """Weight of both, of which the second has a quarter; published 0.25 of B, 0.5 of L, 1 of So400m."""
    num_prototypes: int = 65_536
    """Outputs of the heads that they are compared by."""
    teacher_momentum: float = 0.996
    """Momentum of the teacher's weights."""
    view_flip: float = 0.5
    """Probability that a view is mirrored; 0 where left and right mean something, as in digits."""
    token_budget: int | None = None
    """Patches that a rank holds activations of at a time: a step comes in as many parts as that takes, with the loss
    and the gradient of the whole batch; None = --accum says it."""

    kind = SigLIP2
    config = Siglip2Config
    shape = staticmethod(siglip2_config)
    start = staticmethod(load_siglip2)
    tasks = ("zeroshot", "retrieval", "crosslingual", "caption")
    training_only = TRAINING_ONLY

    def assets(self, data: PairData) -> PairAssets:
        sizes, budget = self.max_patches, self.token_budget
        is_size = sizes is None or (len(sizes) > 0 and min(sizes) >= 1)
        require("siglip2", is_size, "--max-patches must be one number or several, each at least 1, got {}", sizes)
        require("siglip2", 0 < self.view_scale <= 1, "--view-scale must be in (0, 1], got {}", self.view_scale)
        require("siglip2", 0 <= self.parallel <= 1, "--parallel must be in [0, 1], got {}", self.parallel)
        weight = self.caption_weight
        require("siglip2", weight > 0, "--caption-weight must be above 0, or --no-captioning be given, got {}", weight)
        for name in ("caption_weight", "parallel"):
            is_used = self.captioning or getattr(self, name) == getattr(type(self)(), name)
            flag = name.replace("_", "-")
            require("siglip2", is_used, "--{} has no effect with --no-captioning, got {}", flag, getattr(self, name))
        self._check_distillation()
        if budget is not None:
            what = "--accum must be left out with --token-budget, got {}"
            require("siglip2", self.run.accum == 1, what, self.run.accum)
        found = super().assets(data)
        shape: Any = found.shape
        most = shape.max_patches if sizes is None else max(sizes)
        seen = most + (0 if self.distill_from is None else num_patches(math.isqrt(shape.vision.num_patches)))
        what = "--token-budget must hold the {} patches of an image and its views, got {}"
        require("siglip2", budget is None or budget >= seen, what, seen, budget)
        layers = max(1, shape.text.num_layers // 2) if self.captioning else 0
        num = 0 if self.distill_from is None else self.num_prototypes
        shape = replace(shape, max_patches=most, decoder_layers=layers, num_prototypes=num)
        return NaflexAssets(shape, found.tokenizer, found.origin, found.start)

    def _check_distillation(self) -> None:
        for name in ("distill_weight", "num_prototypes", "teacher_momentum", "view_flip"):
            is_used = self.distill_from is not None or getattr(self, name) == getattr(type(self)(), name)
            flag = name.replace("_", "-")
            require("siglip2", is_used, "--{} has no effect without --distill-from, got {}", flag, getattr(self, name))
        if self.distill_from is None:
            return
        require("siglip2", self.distill_from >= 0, "--distill-from must be at least 0, got {}", self.distill_from)
        require("siglip2", self.distill_weight > 0, "--distill-weight must be above 0, got {}", self.distill_weight)
        require("siglip2", self.num_prototypes >= 1, "--num-prototypes must be at least 1, got {}", self.num_prototypes)
        for name in ("teacher_momentum", "view_flip"):
            value = getattr(self, name)
            require("siglip2", 0 <= value <= 1, "--{} must be in [0, 1], got {}", name.replace("_", "-"), value)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        stage = deepspeed_config(self.engine, self.optim, batch_size=self.per_rank, world_size=ranks)[0]
        what = "--zero must be from 0 to 2 with --distill-from, got 3: its teacher follows whole weights"
        require("siglip2", stage["zero_optimization"]["stage"] < 3, what)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("distiller.", frozen_until=self.distill_from),) if self.distill_from else ()

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> NaflexAssets:
        found = super().load_assets(folder, saved, frozen, purpose)
        return NaflexAssets(found.shape, found.tokenizer)

    def build(self, assets: PairAssets) -> SigLIP2:
        model = super().build(assets)
        if model.decoder is not None:
            model.decoder.activation_checkpointing = self.activation_checkpointing
        return model

    # batches

    def sample(self, assets: NaflexAssets, record: Any, rng: np.random.Generator) -> Siglip2Sample:  # pyright: ignore[reportIncompatibleMethodOverride]
        preprocess, sizes = assets.preprocess, self.max_patches or (assets.shape.max_patches,)
        caption, most = record.caption(rng), int(rng.choice(sizes))
        image: Image.Image = record.load(round(preprocess.least(most) / self.view_scale**0.5))
        if self.view_scale < 1:
            image = random_crop(image, rng, (self.view_scale, 1.0))
        parallel, views = bool(rng.random() < self.parallel), None
        if self.distill_from is not None:
            side = math.isqrt(assets.shape.vision.num_patches)
            views = Views.drawn(record, preprocess, side, self.view_flip, rng)
        return Siglip2Sample(preprocess.of(image, most), caption, parallel, views)

    def collate(self, assets: NaflexAssets, samples: list[Siglip2Sample]) -> Siglip2Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        images = Patches.joined([x.image for x in samples])
        tokens = assets.tokenizer([x.caption for x in samples])
        views = None if samples[0].views is None else Views.joined([x.views for x in samples if x.views is not None])
        if not self.captioning:
            return Siglip2Batch(images, tokens, None, None, views)
        # the first token that pads ends a caption
        lengths = ((tokens != assets.tokenizer.pad_token_id).sum(1) + 1).clamp(max=tokens.shape[1]).tolist()
        return Siglip2Batch(images, tokens, lengths, [x.parallel for x in samples], views)

    # steps

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        start, num = self.distill_from, self.num_prototypes
        if start is None:
            return {}

        def decay(num_updates: int) -> float:  # the teacher begins as the student of that step
            return 0.0 if num_updates == 0 and start > 0 else self.teacher_momentum

        centres = {name: Centre(num, _CENTRE_MOMENTUM).to(model.device) for name in ("centre", "patch_centre")}
        return {"teacher": MomentumEncoder(model.deepspeed, decay), **centres}

    def after_step(self, model: Any, step: Step) -> None:
        start: Any = self.distill_from
        found: Any = step.companions
        if start is not None and step.number + 1 >= start:
            found["teacher"].update()
        if start is not None and step.number >= start:
            for name in ("centre", "patch_centre"):
                found[name].update()

    def _taught(self, model: Any, step: Step, views: Views) -> Targets:
        found: Any = step.companions
        teacher, *centres = (found[name] for name in ("teacher", "centre", "patch_centre"))
        is_low = model.precision == "amp_bf16"  # a companion is outside of the engine and of its autocast
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=is_low):
            image, patches, *_ = teacher(None, None, views=views)
        for centre, rows in zip(centres, (image, patches), strict=True):
            centre.add(rows)  # in both passes of a step in parts, which does not change the mean
        return Targets(image, patches, *(centre.mean for centre in centres))  # pyright: ignore[reportArgumentType]

    def backward(self, model: Any, parts: Sequence[Siglip2Batch], step: Step) -> dict[str, Tensor]:
        start = self.distill_from
        if start is not None:
            is_due = step.number >= start
            teach = partial(self._taught, model, step) if is_due else None
            parts = [x._replace(views=x.views if is_due else None, teach=teach) for x in parts]
        if self.token_budget is not None:
            [whole] = parts
            more = 0 if whole.views is None else whole.views.num_patches
            counts = [count + more for count in whole.images.counts]
            parts = [whole.part(rows) for rows in within(counts, self.token_budget, model.device)]
        return super().backward(model, parts, step)

    def features(self, model: Runner, batch: Siglip2Batch) -> tuple[Tensor, ...]:
        if batch.views is None:
            return model(*batch[:4])
        with torch.no_grad():  # a plan, which has no teacher, counts the student again
            targets = batch.teach(batch.views) if batch.teach else model(None, None, views=batch.views)
        return model(*batch[:4], views=batch.views, targets=targets)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        image, text, *rows, scale, bias = features
        pairs = global_sigmoid_loss(image, text, scale, bias)
        if not rows:
            return {"loss": pairs}
        weights = {"captioning": self.caption_weight} if self.captioning else {}
        if len(rows) > 1 or not self.captioning:
            weights |= {"views": self.distill_weight, "patches": _PATCH_SHARE * self.distill_weight}
        means = [global_ratio(x.sum(), torch.tensor(len(x), device=x.device)) for x in rows]
        losses = dict(zip(weights, means, strict=True))
        total = torch.stack([pairs, *(weights[name] * x for name, x in losses.items())]).sum()
        return {"loss": total, "pairs": pairs, **losses}

    # what it can do

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": None} if self.captioning else {}

    def speaks(self, assets: NaflexAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        tokenizer = assets.tokenizer
        options = {"end": tokenizer.pad_token_id, "max_length": tokenizer.context_length, **decoding.options()}

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            given = [prompt for prompt in prompts if prompt]
            require("siglip2", not given, "--prompt must be left out, no text stands before it, got {}", given[:1])
            ids = model(assets.preprocess(images).to(device), None, generate=options)
            return [tokenizer.decode(row) for row in ids.tolist()]

        return say

    def export(self, assets: PairAssets, model: Any, folder: Path, format: str) -> None:
        save_siglip2(model, folder)
        assets.tokenizer.save(folder)


def within(counts: Sequence[int], budget: int, device: torch.device) -> list[slice]:
    """A batch of images of so many patches in parts of at most `budget` patches, each image in one; as many parts on
    every rank, of batches of as many images."""
    bounds, held = [0], 0
    for i, count in enumerate(counts):
        if held + count > budget:
            bounds.append(i)
            held = 0
        held += count
    bounds.append(len(counts))
    wanted = torch.tensor(len(bounds) - 1, device=device)
    if dist.is_initialized():
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
    while len(bounds) - 1 < int(wanted):
        start, end = max(pairwise(bounds), key=lambda x: x[1] - x[0])
        bounds = sorted([*bounds, (start + end) // 2])
    return [slice(*x) for x in pairwise(bounds)]


PROOF = Proof(
    [
        (
            "siglip2",
            "--data digits --model tiny --max-patches 9 16 24 --view-scale 0.6 --batch-size 32 --lr 5e-4 "
            "--epochs 16 --ema 0.98",
        )
    ],
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.9),
        Claim("class named in captions (held-out)", NAMED, 0.8),
    ],
)
