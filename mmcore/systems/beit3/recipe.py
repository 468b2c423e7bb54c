"""BEiT-3's recipe: hidden words and masked patches of texts, images and pairs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.text.masking import mask_tokens
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece
from mmcore.fusion_recipe import CompletesTexts, FusionAssets, FusionRecipe, FusionSample
from mmcore.losses import global_ratio, trimmed
from mmcore.ops import require
from mmcore.parts.vit import Tower
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.runs import is_run
from mmcore.settings import from_json, once
from mmcore.systems.beit3.model import BEiT3, Beit3Config, Head
from mmcore.systems.beit3.shapes import BEIT3_CONFIGS
from mmcore.systems.beit3.weights import fitted_state, is_beit3, load_beit3, save_beit3
from mmcore.systems.mim.model import MaskConfig, MimConfig
from mmcore.systems.mim.recipe import Beit2
from mmcore.systems.mim.sources import MimAssets, resized
from mmcore.tasks.reconstruction import OVER_FREQUENT, Reconstructs
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

PUBLISHED = partial(OptimConfig, lr=1e-3, weight_decay=0.05, warmup=10_000)


@dataclass(frozen=True)
class OnBeit3(FusionRecipe):
    """Mixin: the model is a BEiT-3."""

    optim: OptimConfig = field(default_factory=PUBLISHED)
    model: str = "tiny"
    """tiny, base, large, or giant, whose attention is shared; with --from it is that one's."""
    max_text: int = 64
    """Tokens of a text, [CLS] and [SEP] included."""
    image_size: int | None = None
    """Pixels of the side of an image; None = those of --model or --from. Positions of --from are interpolated."""
    drop_path: float | None = None
    """Share of the residuals that are left out of the last layer in training, of the first 0; None = as --model has
    it."""
    decoupled: bool | None = None
    """Whether attention and its norms are one a modality, as in the published base and large, or shared, as in the
    paper's giant; None = as --model or --from has it."""

    shapes = BEIT3_CONFIGS
    kind = BEiT3
    formats = ("beit3",)
    ends_in: ClassVar[Head] = "pretraining"

    def fitted(self, shape: Beit3Config, wordpiece: WordPiece) -> Beit3Config:
        vision, size = shape.vision, self.image_size
        if size is not None:
            patch, what = vision.patch_size, "--image-size must be a multiple of the patches' {} pixels, got {}"
            require(self.name, size >= patch and size % patch == 0, what, patch, size)
            vision = replace(vision, image_size=size)
        if self.drop_path is not None:
            require(self.name, 0 <= self.drop_path < 1, "--drop-path must be from 0, below 1, got {}", self.drop_path)
            vision = replace(vision, drop_path=self.drop_path)
        decoupled = shape.decoupled if self.decoupled is None else self.decoupled
        same = self.start is None or decoupled == shape.decoupled
        require(self.name, same, "--decoupled must be as --from has it, {}, got {}", shape.decoupled, decoupled)
        most, num = shape.num_text, wordpiece.vocab_size - 1  # less [DEC], the last
        require(self.name, self.max_text <= most, "--max-text must be at most {}, got {}", most, self.max_text)
        what = "--tokenizer must have the {} words of --from, got {}"
        require(self.name, self.start is None or num == shape.vocab_size, what, shape.vocab_size, num)
        words: Any = {"vocab_size": num, "pad_token_id": wordpiece.pad_token_id, "num_answers": 0}
        if type(self).ends_in == "answers":
            words["num_answers"] = 1  # as many as there are is told by the data
        return replace(shape, vision=vision, decoupled=decoupled, head=type(self).ends_in, **words)

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        if is_run(path):
            return super().read_start(path)
        what = "--from must be a run or a folder of beit3, or a published file, got {}"
        require(self.name, is_beit3(path), what, path)
        model = load_beit3(path)
        return model.config, load_wordpiece(path) if path.is_dir() else None, dict(model.state_dict())

    def initial(self, assets: FusionAssets, model: Any) -> Mapping[str, Tensor]:
        if self.start is None:
            return {}
        ours, state = model.state_dict(), fitted_state(self.read_start(self.start)[2], assets.shape)
        return {name: x for name, x in state.items() if name in ours and x.shape == ours[name].shape}

    def image_tower(self, assets: FusionAssets, model: BEiT3) -> Tower:
        raise ValueError("--vision must be a ViT, got a BEiT-3, whose blocks have norms inside")

    def export(self, assets: FusionAssets, model: BEiT3, folder: Path, format: str) -> None:
        save_beit3(model, folder)
        assets.wordpiece.save(folder)


@dataclass(frozen=True)
class Beit3Assets(FusionAssets):
    """With what makes codes of patches, whose weights are `frozen`."""

    source: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> dict[str, Any]:
        return {**super().save(folder), "source": dict(self.source)}

    def __getstate__(self) -> dict[str, Any]:  # for processes that read data
        return {name: x for name, x in self.__dict__.items() if name != "coder"} | {"frozen": {}}

    @cached_property
    def coder(self) -> MimAssets:
        """As masked image modelling has it."""
        return MimAssets(mim_shape(self.shape), self.source, frozen=self.frozen)

    @property
    def summary(self) -> dict[str, str]:
        return {**super().summary, **{n: x for n, x in self.coder.summary.items() if n == "targets"}}


def mim_shape(shape: Beit3Config) -> MimConfig:
    return MimConfig(shape.vision, shape.num_codes)


class Beit3Sample(NamedTuple):
    """A pair, and which of its patches are masked."""

    pair: FusionSample
    masked: Tensor


class Beit3Batch(NamedTuple):
    """Pairs of one rank, their texts padded to one length on all ranks."""

    images: Tensor  # uint8 [B, 3, S, S]
    masked: Tensor  # bool [B, P], the patches that are not shown
    num_text: Tensor  # int64 [B], how many tokens are no padding
    alone: Tensor  # int64 [B, T], a text of which some words are hidden
    alone_labels: Tensor  # int64 [B, T], what was there, -100 elsewhere
    beside: Tensor  # int64 [B, T], that beside the image, of which more are
    beside_labels: Tensor  # int64 [B, T]


@dataclass(frozen=True)
class Beit3(OnBeit3, CompletesTexts):
    """Train BEiT-3 (arXiv 2208.10442) on image-caption pairs: hidden words and codes of masked patches, of texts, of
    images, and of both together."""

    run: RunConfig = field(default_factory=partial(RunConfig, steps=1_000_000))
    codes: str | None = field(default=None, metadata=once)
    """What makes codes of patches: a run of vqkd, BEiT v2's tokenizer; kmeans, also None = the nearest of --num-codes
    patches of pixels, fitted to the training images first; or a folder of transformers' FlavaImageCodebook."""
    num_codes: int | None = None
    """Codes of kmeans; None = as --model has it."""
    mask_ratio: float = 0.4
    """Share of the patches that are masked, in rectangles."""
    text_mask_ratio: float = 0.15
    """Share of the words of a text alone that are hidden."""
    pair_mask_ratio: float = 0.5
    """Share of the words of a text beside an image that are hidden."""

    tasks = ("cloze", "reconstruction")
    training_only = ("code_head.",)

    @property
    def mask(self) -> MaskConfig:
        return MaskConfig("blocks", self.mask_ratio, min_block=16 if self.model != "tiny" else 2)

    def assets(self, data: PairData) -> Beit3Assets:
        for name in ("text_mask_ratio", "pair_mask_ratio"):
            value = getattr(self, name)
            require(self.name, 0 < value <= 1, "--{} must be in (0, 1], got {}", name.replace("_", "-"), value)
        found = super().assets(data)
        side = mim_shape(found.shape).side
        try:
            self.mask.draw(side, np.random.default_rng(0))
        except ValueError as error:
            raise ValueError(f"--mask-ratio must leave and mask patches of {side} x {side}: {error}") from None
        coder = Beit2(run=self.run, tokenizer=self.codes, num_tokens=self.num_codes)
        try:
            made = coder.with_source(data, mim_shape(found.shape))
        except ValueError as error:
            said = str(error).replace("--tokenizer", "--codes").replace("--num-tokens", "--num-codes")
            raise ValueError(re.sub(r"^\w+(?=:)", self.name, said)) from None
        shape = replace(found.shape, num_codes=made.shape.outputs)
        return Beit3Assets(shape, found.wordpiece, found.origin, source=made.source, frozen=made.frozen)

    def load_assets(self, folder: Path, saved: Mapping[str, Any], frozen: Any, purpose: Any) -> Beit3Assets:
        wordpiece = load_wordpiece(folder / "tokenizer")
        return Beit3Assets(from_json(Beit3Config, saved), wordpiece, source=saved["source"], frozen=frozen)

    def build(self, assets: Beit3Assets) -> BEiT3:  # pyright: ignore[reportIncompatibleMethodOverride]
        model: BEiT3 = super().build(assets)
        model.coder = partial(codes_of, assets)
        return model

    # batches

    def sample(self, assets: Beit3Assets, record: Any, rng: np.random.Generator) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        pair = super().sample(assets, record, rng)
        return Beit3Sample(pair, self.mask.draw(mim_shape(assets.shape).side, rng))

    def collate(self, assets: Beit3Assets, samples: list[Beit3Sample]) -> Beit3Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        captions = [x.pair.pair.caption for x in samples]
        tokens, num_text = assets.wordpiece.padded(captions, self.max_text)
        words = assets.wordpiece
        options: Any = {"mask_id": words.mask_token_id, "num_words": words.vocab_size - 1}
        hidden = []
        for row, x in zip(tokens, samples, strict=True):
            rng = np.random.default_rng(x.pair.seed)
            for ratio in (self.text_mask_ratio, self.pair_mask_ratio):
                hidden += mask_tokens(row, words.is_word(row), ratio, rng, **options)
        texts = [torch.stack(hidden[i::4]) for i in range(4)]
        images = torch.stack([x.pair.pair.image for x in samples])
        return Beit3Batch(images, torch.stack([x.masked for x in samples]), num_text, *texts)

    def loss(self, model: Runner, batch: Beit3Batch, step: Step) -> dict[str, Tensor]:
        alone = trimmed(batch.alone, batch.num_text)
        texts = alone, *(x[:, : alone.shape[1]] for x in batch[4:])
        sums = model("pretrain", batch.images, batch.masked, batch.num_text, *texts)
        _, alone_labels, _, beside_labels = texts
        masked = batch.masked.sum()
        counts = masked, (alone_labels >= 0).sum(), masked, (beside_labels >= 0).sum()
        names = "images", "texts", "patches of pairs", "words of pairs"
        losses = {name: global_ratio(x, num) for name, x, num in zip(names, sums, counts, strict=True)}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def reconstructs(self, assets: Beit3Assets, model: Runner, device: torch.device) -> Reconstructs:
        side = mim_shape(assets.shape).side
        draw, codes = partial(self.mask.draw, side), partial(codes_of, assets)
        return Reconstructs(assets.preprocess, draw, codes, partial(model, "codes"), None, "accuracy")


def codes_of(assets: Beit3Assets, images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] to codes, int64 [B, P]."""
    return assets.coder.made(images.device).indices(resized(images, assets.coder.seen.size))


PRETRAINED = (
    ("clip", "--data digits --model tiny --lr 1e-3 --epochs 30"),
    (
        "vqkd",
        "--data digits --views source --teacher {0} --batch-size 128 --steps 200 --lr 2e-3 --warmup 20 "
        "--weight-decay 1e-4",
    ),
    (
        "beit3",
        "--data digits --codes {1} --max-text 16 --batch-size 32 --steps 3000 --lr 3e-3 --warmup 50 --ema 0.99 "
        "--eval-every 1000",
    ),
)
PROOF = Proof(
    PRETRAINED,
    [
        Claim("cloze accuracy (held-out)", "cloze accuracy", 0.80),
        Claim("accuracy above each place's most frequent code (held-out)", OVER_FREQUENT, 0.1, ceiling=0.0),
    ],
)
