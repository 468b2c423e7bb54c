"""ViLT's recipe: hidden words, matching, and words aligned with patches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.collate import PairSample
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece
from mmcore.data.transforms.images import random_crop
from mmcore.data.transforms.naflex import Patches
from mmcore.fusion_recipe import CompletesTexts, FusionAssets, FusionBatch, FusionRecipe, FusionSample, MatchesPairs
from mmcore.losses import global_ratio, matching_loss
from mmcore.ops import require
from mmcore.parts.towers import load_tower
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.runs import is_run
from mmcore.settings import once
from mmcore.systems.vilt.model import Kept, Learned, ViLT
from mmcore.systems.vilt.shapes import VILT_CONFIGS, Head, ViltConfig
from mmcore.systems.vilt.weights import load_vilt, save_vilt
from mmcore.train.optim import OptimConfig

PUBLISHED = partial(OptimConfig, lr=1e-4, eps=1e-8, weight_decay=0.01, schedule="linear")
ALIGNMENT_WEIGHT = 0.1


class ViltBatch(NamedTuple):
    """Arguments of `ViLT.pretrain`, and which texts are about the image that they are matched with."""

    images: Patches
    kept: Kept | None
    tokens: Tensor
    lengths: list[int]
    masked: Tensor
    hidden: Tensor
    wanted: Tensor
    image_index: list[int]
    is_match: Tensor


@dataclass(frozen=True)
class OnVilt(FusionRecipe):
    """Mixin: the model is a ViLT, of images of unequal sizes."""

    optim: OptimConfig = field(default_factory=PUBLISHED)
    model: str = "tiny"
    """tiny, or B-32 (as published); with --from it is that one's."""
    max_text: int = 40
    """Tokens of a text, [CLS] and [SEP] included."""
    view_scale: float = 0.9
    """Least share of an image's area that it is trained on, in a crop of aspect 3/4 to 4/3; 1 = the whole image."""

    shapes = VILT_CONFIGS
    kind = ViLT
    formats = ("hf",)
    accumulates = True
    ends_in: ClassVar[Head] = "pretraining"
    num_images: ClassVar[int] = 1

    def fitted(self, shape: ViltConfig, wordpiece: WordPiece) -> ViltConfig:
        num = wordpiece.vocab_size - 1  # without what begins a text to generate
        if self.start is None:
            shape = replace(shape, vocab_size=num)
        what = "--tokenizer must have at most {} words, got {}"
        require(self.name, num <= shape.vocab_size, what, shape.vocab_size, num)
        most = shape.context_length
        require(self.name, self.max_text <= most, "--max-text must be at most {}, got {}", most, self.max_text)
        modalities = max(shape.num_modalities, 1 + self.num_images)
        ends = {"num_answers": 0, "num_images": self.num_images, "num_modalities": modalities}
        return replace(shape, head=self.ends_in, **ends)

    def assets(self, data: Any) -> FusionAssets:
        require(self.name, 0 < self.view_scale <= 1, "--view-scale must be in (0, 1], got {}", self.view_scale)
        return super().assets(data)

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        if is_run(path):
            return super().read_start(path)
        model = load_vilt(path)
        has_words = any((path / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
        return model.config, load_wordpiece(path) if has_words else None, dict(model.state_dict())

    def initial(self, assets: FusionAssets, model: Any) -> Mapping[str, Tensor]:
        found, name = dict(super().initial(assets, model)), "modality.weight"
        if self.start is not None and name not in found:  # what stands for a second image begins as the first's
            known = self.read_start(self.start)[2][name]
            more = known[1:2].expand(assets.shape.num_modalities - len(known), -1)
            found[name] = torch.cat([known, more])[: assets.shape.num_modalities]
        return found

    # batches

    def view(self, assets: Any, image: Image.Image, rng: np.random.Generator) -> Patches:
        """What is trained on of an image."""
        if self.view_scale < 1:
            least = 2 * assets.preprocess.shorter
            if min(image.size) < least:  # so that crops of a small one differ by less than its pixels
                scale = least / min(image.size)
                width, height = (round(scale * side) for side in image.size)
                image = image.resize((width, height), assets.preprocess.resample)
            image = random_crop(image, rng, (self.view_scale, 1.0))
        return assets.preprocess.of(image)

    def sample(self, assets: Any, record: Any, rng: np.random.Generator) -> FusionSample:
        caption = record.caption(rng)
        image = record.load(math.ceil(2 * assets.preprocess.shorter / self.view_scale**0.5))
        pixels: Any = self.view(assets, image, rng)
        pair = PairSample(pixels, caption, record.label(caption), record.image_id, record.question)
        return FusionSample(pair, int(rng.integers(2**62)), record.answers)

    def joined(self, images: list[Patches]) -> Patches:
        return Patches.joined(images)

    # what follows

    def export(self, assets: FusionAssets, model: ViLT, folder: Path, format: str) -> None:
        save_vilt(model, folder, assets.answers)
        assets.wordpiece.save(folder)


@dataclass(frozen=True)
class Vilt(OnVilt, CompletesTexts, MatchesPairs):
    """Train ViLT (arXiv 2102.03334) on image-caption pairs: hidden words, matching, words aligned with patches."""

    vision: Path | None = field(default=None, metadata=once)
    """What the transformer starts from: a ViT of a run or a folder (published: ViT-B/32 at 384 pixels); None = from
    nothing, or from --from."""
    max_patches: int | None = 200
    """Patches that are read of an image in training, drawn at random where it has more; None = all."""

    whole_words = True
    hides_some = True
    tasks = ("matching", "cloze")

    def assets(self, data: PairData) -> FusionAssets:
        most = self.max_patches
        require(self.name, most is None or most >= 1, "--max-patches must be at least 1, got {}", most)
        assets = super().assets(data)
        if self.vision is None:
            return assets
        require(self.name, self.start is None, "--vision must be left out with --from, got {}", self.vision)
        given, own = load_tower(self.vision).bare.config, assets.shape.vision
        fits = (given.width, given.patch_size) == (own.width, own.patch_size) and given.num_layers == own.num_layers
        fits &= given.has_class_token and given.positions == "learned" and not given.has_norm_pre
        fits &= given.num_heads == own.num_heads and given.layer_scale is None and not given.num_registers
        what = "--vision must be a ViT of --model {} ({}), got {}"
        require(self.name, fits, what, self.model, own.summary, given.summary)
        kept = ("image_size", "norm_eps", "activation", "mlp_dim", "image_mean", "image_std")
        options = {name: getattr(given, name) for name in kept}
        return replace(assets, shape=replace(assets.shape, vision=replace(own, **options)))

    def initial(self, assets: FusionAssets, model: Any) -> Mapping[str, Tensor]:
        if self.vision is None:
            return super().initial(assets, model)
        ours, state = model.state_dict(), load_tower(self.vision).bare.state
        return {f"visual.{name}": x for name, x in state.items() if f"visual.{name}" in ours}

    def collate(self, assets: Any, samples: list[FusionSample]) -> ViltBatch:
        batch: FusionBatch = super().collate(assets, samples)
        rngs = [np.random.default_rng([x.seed, 1]) for x in samples]
        labels = batch.labels.flatten()
        places = (labels != -100).nonzero()[:, 0]
        index = matched_images(batch.image_ids.tolist(), batch.text_ids.tolist(), rngs)
        is_match = torch.tensor(index) == torch.arange(len(index))
        kept, lengths = self.kept(batch.images, rngs), batch.num_text.tolist()
        texts = batch.tokens, lengths, batch.masked, places, labels[places]
        return ViltBatch(batch.images, kept, *texts, index, is_match)

    def kept(self, images: Patches, rngs: Sequence[np.random.Generator]) -> Kept | None:
        """Patches that are drawn, where an image has too many."""
        counts, most = images.counts, self.max_patches
        if most is None or max(counts, default=0) <= most:
            return None
        starts = np.cumsum([0, *counts])
        drawn = [
            a + np.sort(rng.choice(n, most, replace=False)) if n > most else np.arange(a, a + n)
            for a, n, rng in zip(starts, counts, rngs, strict=False)
        ]
        return Kept(torch.tensor(np.concatenate(drawn)), [len(x) for x in drawn])

    def loss(self, model: Runner, batch: ViltBatch, step: Step) -> dict[str, Tensor]:
        learned: Learned = model("pretrain", *batch[:-1])
        device, sign = learned.match.device, torch.where(batch.is_match.to(learned.match.device), 1, -1)
        words = global_ratio(learned.words, torch.tensor(len(batch.wanted), device=device))
        matching = matching_loss(learned.match, sign > 0)
        alignment = global_ratio((sign * learned.distance).sum(), torch.tensor(len(sign), device=device))
        loss = words + matching + ALIGNMENT_WEIGHT * alignment
        return {"loss": loss, "words": words, "matching": matching, "alignment": alignment}


def matched_images(image_ids: Sequence[int], text_ids: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[int]:
    """The image that each text is matched with: its own, or as often one drawn from those of other rows, of another
    image and another caption; its own where there is no such row."""
    images, texts = np.array(image_ids), np.array(text_ids)
    index = []
    for row, rng in enumerate(rngs):
        is_wrong = rng.random() < 0.5
        others = np.flatnonzero((images != images[row]) & (texts != texts[row])) if is_wrong else []
        index.append(int(rng.choice(others)) if len(others) else row)
    return index


_VIEWS = "--views source --mixup 0 --cutmix 0 --rand-augment None --erase 0 --drop-path 0"
TOWER = ("vit", f"--data digits {_VIEWS} --batch-size 128 --steps 200 --lr 2e-3 --warmup 20")
"""A ViT that knows the pictures' classes, as the published one knows ImageNet's."""
PRETRAIN = (
    "vilt",
    "--data digits --model tiny --vision {0} --batch-size 64 --epochs 35 --lr 1.5e-3 --schedule const-cooldown",
)
PROOF = Proof(
    [TOWER, (PRETRAIN[0], f"{PRETRAIN[1]} --ema 0.99")],
    [Claim("cloze accuracy (held-out)", "cloze accuracy", 0.8), Claim("ITM accuracy (held-out)", "ITM accuracy", 0.85)],
)
