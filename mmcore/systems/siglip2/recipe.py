"""SigLIP 2's recipe: images of any shape, the sigmoid loss of all pairs, and captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.transforms.images import random_crop
from mmcore.data.transforms.naflex import NaflexPreprocess, Patches
from mmcore.losses import global_ratio, global_sigmoid_loss
from mmcore.ops import require
from mmcore.recipe import Claim, Embeds, Proof, Runner, Step
from mmcore.settings import once
from mmcore.systems.siglip.recipe import Siglip
from mmcore.systems.siglip2.model import SigLIP2, Siglip2Config
from mmcore.systems.siglip2.shapes import siglip2_config
from mmcore.systems.siglip2.weights import load_siglip2, save_siglip2
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.two_towers import PairAssets


class Siglip2Sample(NamedTuple):
    """An image, its caption, and whether that is predicted from masks."""

    image: Patches
    caption: str
    parallel: bool


class Siglip2Batch(NamedTuple):
    """Images; tokens int64 [B, T], how many of each caption are learned, and which captions are predicted from masks;
    both None without a decoder."""

    images: Patches
    tokens: Tensor
    lengths: list[int] | None
    parallel: list[bool] | None

    def part(self, rows: slice) -> "Siglip2Batch":
        lengths, parallel = (None if x is None else x[rows] for x in (self.lengths, self.parallel))
        return Siglip2Batch(self.images.part(rows), self.tokens[rows], lengths, parallel)


class NaflexAssets(PairAssets):
    """`PairAssets` of a model of images of any shape."""

    @property
    def preprocess(self) -> NaflexPreprocess:  # pyright: ignore[reportIncompatibleVariableOverride]
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
    token_budget: int | None = None
    """Patches that a rank holds activations of at a time: a step comes in as many parts as that takes, with the loss
    and the gradient of the whole batch; None = --accum says it."""

    kind = SigLIP2
    config = Siglip2Config
    shape = staticmethod(siglip2_config)
    start = staticmethod(load_siglip2)
    tasks = ("zeroshot", "retrieval", "crosslingual")
    training_only = ("decoder.",)

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
        if budget is not None:
            what = "--accum must be left out with --token-budget, got {}"
            require("siglip2", self.run.accum == 1, what, self.run.accum)
        found = super().assets(data)
        shape: Any = found.shape
        most = shape.max_patches if sizes is None else max(sizes)
        what = "--token-budget must hold the {} patches of an image, got {}"
        require("siglip2", budget is None or budget >= most, what, most, budget)
        layers = max(1, shape.text.num_layers // 2) if self.captioning else 0
        shape = replace(shape, max_patches=most, decoder_layers=layers)
        return NaflexAssets(shape, found.tokenizer, found.origin, found.start)

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
        return Siglip2Sample(preprocess.of(image, most), caption, bool(rng.random() < self.parallel))

    def collate(self, assets: NaflexAssets, samples: list[Siglip2Sample]) -> Siglip2Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        images = Patches.joined([x.image for x in samples])
        tokens = assets.tokenizer([x.caption for x in samples])
        if not self.captioning:
            return Siglip2Batch(images, tokens, None, None)
        # the first token that pads ends a caption
        lengths = ((tokens != assets.tokenizer.pad_token_id).sum(1) + 1).clamp(max=tokens.shape[1]).tolist()
        return Siglip2Batch(images, tokens, lengths, [x.parallel for x in samples])

    # steps

    def backward(self, model: Any, parts: Sequence[Siglip2Batch], step: Step) -> dict[str, Tensor]:
        if self.token_budget is not None:
            [whole] = parts
            parts = [whole.part(rows) for rows in within(whole.images.counts, self.token_budget, model.device)]
        return super().backward(model, parts, step)

    def features(self, model: Runner, batch: Siglip2Batch) -> tuple[Tensor, ...]:
        return model(*batch)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        if not self.captioning:
            return super().objective(features, parts, step)
        image, text, captions, scale, bias = features
        pairs = global_sigmoid_loss(image, text, scale, bias)
        captioning = global_ratio(captions.sum(), torch.tensor(len(captions), device=captions.device))
        return {"loss": pairs + self.caption_weight * captioning, "pairs": pairs, "captioning": captioning}

    # what it can do

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": None} if self.captioning else {}

    def speaks(self, assets: NaflexAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        tokenizer = assets.tokenizer
        options = {"end": tokenizer.pad_token_id, "max_length": tokenizer.context_length, **decoding.options()}

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            given = [prompt for prompt in prompts if prompt]
            require(
                "siglip2", not given, "--prompt must be left out, no text stands before captions, got {}", given[:1]
            )
            ids = model(assets.preprocess(images).to(device), None, generate=options)
            return [tokenizer.decode(row) for row in ids.tolist()]

        return say

    def embeds(self, assets: NaflexAssets, model: Runner, device: torch.device) -> Embeds:
        found = super().embeds(assets, model, device)
        return replace(found, preprocess=assets.preprocess)

    def export(self, assets: PairAssets, model: SigLIP2, folder: Path, format: str) -> None:
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
            "--epochs 20 --ema 0.98",
        )
    ],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.9)],
)
