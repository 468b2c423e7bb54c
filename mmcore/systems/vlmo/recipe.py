"""VLMo's recipes: texts alone, and pairs; what images alone teach is the tower of BEiT that they start from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmcore.data import PairData, Reader
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece
from mmcore.fusion_recipe import CompletesTexts, FusionAssets, FusionBatch, FusionRecipe, MatchesPairs
from mmcore.losses import (
    global_contrastive_loss,
    global_ratio,
    hard_negatives,
    matching_loss,
    matching_rows,
    pair_labels,
    trimmed,
)
from mmcore.ops import require
from mmcore.parts.towers import load_tower
from mmcore.parts.vit import Tower, VisionConfig
from mmcore.recipe import Claim, Embeds, Proof, Runner, Step
from mmcore.runs import is_run, load_weights
from mmcore.settings import once
from mmcore.systems.vlmo.model import TEXT, Features, VLMo, VlmoConfig
from mmcore.systems.vlmo.shapes import VLMO_CONFIGS
from mmcore.systems.vlmo.weights import fitted_state, is_vlmo, load_vlmo, of_tower, save_vlmo
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig, Rule

PUBLISHED = partial(OptimConfig, lr=2e-4, eps=1e-8, weight_decay=0.01, warmup=2500, schedule="linear")


@dataclass(frozen=True)
class OnVlmo(FusionRecipe):
    """Mixin: the model is a VLMo."""

    run: RunConfig = field(default_factory=partial(RunConfig, steps=200_000, batch_size=64))
    optim: OptimConfig = field(default_factory=PUBLISHED)
    model: str = "tiny"
    """tiny, base, base-plus or large; with --from it is that one's."""
    vision: Path | None = field(default=None, metadata=once)
    """The tower that the experts of images, the attention and the patches start from, the first stage: a run, folder or
    file of BEiT or BEiT v2; None = from nothing, or from --from."""
    max_text: int = 40
    """Tokens of a text, [CLS] and [SEP] included."""
    image_size: int | None = None
    """Pixels of the side of an image; None = those of --model, --vision or --from. Positions of these are
    interpolated."""
    drop_path: float | None = None
    """Share of the residuals that are left out of the last block in training, of the first 0, and of what a word begins
    with; None = as --model, --vision or --from has it."""

    shapes = VLMO_CONFIGS
    kind = VLMo
    formats = ("vlmo",)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("relative.", weight_decay=0.0),)

    def fitted(self, shape: VlmoConfig, wordpiece: WordPiece) -> VlmoConfig:
        if self.vision is not None:
            shape = replace(shape, vision=vision_of(self.name, self.vision, load_tower(self.vision).bare.config, shape))
        vision, size = shape.vision, self.image_size
        if size is not None:
            patch, what = vision.patch_size, "--image-size must be a multiple of the patches' {} pixels, got {}"
            require(self.name, size >= patch and size % patch == 0, what, patch, size)
            vision = replace(vision, image_size=size)
        if self.drop_path is not None:
            require(self.name, 0 <= self.drop_path < 1, "--drop-path must be from 0, below 1, got {}", self.drop_path)
            vision = replace(vision, drop_path=self.drop_path)
        elif self.vision is not None:
            vision = replace(vision, drop_path=shape.vision.drop_path)
        has_table = vision.relative_positions == "layers"
        most = shape.num_distances if has_table and vision.positions == "none" else None
        if most is None and self.start is not None:
            most = shape.num_text
        fits = most is None or self.max_text <= most
        require(self.name, fits, "--max-text must be at most the {} of the model, got {}", most, self.max_text)
        shape = replace(shape, num_distances=max(shape.num_distances, self.max_text if has_table else 0))
        words = {"vocab_size": wordpiece.vocab_size - 1, "pad_token_id": wordpiece.pad_token_id}  # less [DEC], the last
        return replace(shape, vision=vision, num_text=self.max_text, num_answers=0, **words)

    def assets(self, data: PairData) -> FusionAssets:
        both = self.vision is not None and self.start is not None
        require(self.name, not both, "--vision must be left out with --from, which has a tower, got {}", self.vision)
        return super().assets(data)

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        if is_run(path):
            return super().read_start(path)
        require(self.name, is_vlmo(path), "--from must be a run or a folder of vlmo, or a published file, got {}", path)
        model = load_vlmo(path)
        return model.config, load_wordpiece(path) if path.is_dir() else None, dict(model.state_dict())

    def initial(self, assets: FusionAssets, model: Any) -> Mapping[str, Tensor]:
        shape: VlmoConfig = assets.shape
        if self.vision is not None:
            state = of_tower(load_tower(self.vision).bare, shape)
        elif self.start is not None:
            begun, _, state = self.read_start(self.start)
            state = fitted_state(state, begun.vision.image_size // begun.vision.patch_size, shape)
        else:
            return {}
        ours = model.state_dict()
        return {name: x for name, x in state.items() if name in ours and x.shape == ours[name].shape}

    def image_tower(self, assets: FusionAssets, model: VLMo) -> Tower:
        return model.image_tower().bare

    def export(self, assets: FusionAssets, model: VLMo, folder: Path, format: str) -> None:
        save_vlmo(model, folder)
        assets.wordpiece.save(folder)


def vision_of(op: str, path: Path, given: VisionConfig, shape: VlmoConfig) -> VisionConfig:
    """The shape of a tower as a VLMo has it; a ValueError of one that it cannot start from."""
    kinds = {"shared": "layers"}
    fits = given.has_class_token and given.has_patch_bias and not (given.has_norm_pre or given.has_swiglu)
    fits &= given.num_registers == 0 and given.num_layers > shape.num_joint and given.positions != "sincos"
    what = "--vision must be a tower as BEiT has it, of more than {} layers, got {} in {}"
    require(op, fits, what, shape.num_joint, given.summary, path)
    relative: Any = kinds.get(given.relative_positions, given.relative_positions)
    has_positions = (given.positions, relative) != ("none", "none")
    require(op, has_positions, "--vision must be a tower with positions, got none in {}", path)
    return replace(given, relative_positions=relative, has_final_norm=True, has_mask_token=False)


@dataclass(frozen=True)
class Vlmo(OnVlmo, MatchesPairs, CompletesTexts):
    """Train VLMo (arXiv 2111.02358) on image-caption pairs, its last stage: contrast by the experts of each and of
    both, matching with hard negatives, hidden words."""

    tasks = ("zeroshot", "matching", "cloze", "retrieval")
    whole_words = True

    def loss(self, model: Runner, batch: FusionBatch, step: Step) -> dict[str, Tensor]:
        tokens = trimmed(batch.tokens, batch.num_text)
        masked, labels = (x[:, : tokens.shape[1]] for x in (batch.masked, batch.labels))
        found: Features = model("pairs", batch.images, tokens, batch.num_text)
        ids = pair_labels(batch.image_ids, batch.text_ids)
        own, joint = (
            global_contrastive_loss(image, text, scale, labels=(ids, ids))
            for image, text, scale in (
                (found.image, found.text, found.scale),
                (found.image_joint, found.text_joint, found.scale_joint),
            )
        )
        options: Any = {"image_ids": batch.image_ids, "text_ids": batch.text_ids, "generator": step.generator}
        negatives = hard_negatives(found.image[:, None], found.text, found.scale, **options)
        rows = matching_rows(negatives, batch.images, (tokens, batch.num_text))
        images = torch.cat([batch.images, rows.more])
        matched = model("match", images, rows.image_index, *rows.texts)
        total = model("word_loss", batch.images, masked, batch.num_text, labels)
        losses = {
            "contrast": 0.5 * (own + joint),
            "matching": matching_loss(matched, rows.is_match),
            "words": 0.25 * global_ratio(total, (labels >= 0).sum()),
        }
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def embeds(self, assets: FusionAssets, model: Runner, device: torch.device) -> Embeds:
        def text(captions: list[str]) -> Tensor:
            return model("embed_text", *self.padded(assets, captions, device))

        return Embeds(assets.preprocess, lambda images: images, partial(model, "embed_image"), text)


class TextSample(NamedTuple):
    """A caption, and what its words are hidden by."""

    caption: str
    seed: int


class TextBatch(NamedTuple):
    """Texts of one rank, padded to one length on all ranks."""

    masked: Tensor  # int64 [B, T]
    num_text: Tensor  # int64 [B]
    labels: Tensor  # int64 [B, T], -100 where nothing is hidden


@dataclass(frozen=True)
class VlmoText(OnVlmo, CompletesTexts):
    """Train VLMo (arXiv 2111.02358) on texts alone, the captions of any source, its second stage: hidden words, by the
    experts of texts."""

    max_text: int = 196
    """Tokens of a text, [CLS] and [SEP] included."""
    freeze: bool = True
    """Keep all that images go through as --vision or --from has it, the attention too, as the paper does;
    --no-freeze: the attention learns, as in the published code."""

    tasks = ("cloze",)
    whole_words = True

    def assets(self, data: PairData) -> FusionAssets:
        has_start = self.vision is not None or self.start is not None
        what = "--freeze must come with --vision or --from, whose attention stays as it is, got neither"
        require(self.name, has_start or not self.freeze, what)
        found = super().assets(data)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.run.seed)
            model = VLMo(found.shape)
        state = {**model.state_dict(), **self.initial(found, model)}
        return replace(found, frozen={name: x for name, x in state.items() if not self.learns(name)})

    def learns(self, name: str) -> bool:
        """Whether a weight does: what texts alone go through, and where attention is not frozen, that."""
        if name.startswith(("text_embed.", "text_head.", "relative.")):
            return True
        part, _, rest = name.partition(".")
        if part != "blocks":
            return part == "norm" and not self.freeze
        _, kind, number = (f"{rest}.").split(".")[:3]
        return number == str(TEXT) if kind in ("norms", "mlps") else not self.freeze

    def build(self, assets: FusionAssets) -> VLMo:
        model: VLMo = super().build(assets)
        load_weights(model, assets.frozen, is_whole=False)
        for name, p in model.named_parameters():
            p.requires_grad_(self.learns(name))
        return model

    def initial(self, assets: FusionAssets, model: Any) -> Mapping[str, Tensor]:
        return {name: x for name, x in super().initial(assets, model).items() if name not in assets.frozen}

    def reader(self, assets: FusionAssets) -> Reader:
        return super().reader(replace(assets, frozen={}))  # which processes that read data do not need

    def sample(self, assets: FusionAssets, record: Any, rng: np.random.Generator) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return TextSample(record.caption(rng), int(rng.integers(2**62)))

    def collate(self, assets: FusionAssets, samples: list[TextSample]) -> TextBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, num_text = assets.wordpiece.padded([x.caption for x in samples], self.max_text)
        hidden = [self.hidden(assets, row, x.seed) for row, x in zip(tokens, samples, strict=True)]
        masked, labels = (torch.stack(x) for x in zip(*hidden, strict=True))
        return TextBatch(masked, num_text, labels)

    def loss(self, model: Runner, batch: TextBatch, step: Step) -> dict[str, Tensor]:
        masked = trimmed(batch.masked, batch.num_text)
        labels = batch.labels[:, : masked.shape[1]]
        total = model("word_loss", None, masked, batch.num_text, labels)
        return {"loss": global_ratio(total, (labels >= 0).sum())}

    def completes(self, assets: FusionAssets, model: Runner, device: torch.device) -> Any:
        """By the text alone."""
        return super().completes(assets, lambda task, _, *texts: model(task, None, *texts), device)


_IMAGES = ("beit", "--data digits --view-scale 1 --view-flip 0 --batch-size 128 --steps 300 --lr 3e-3 --warmup 20")
_TEXTS = ("vlmo-text", "--data digits --vision {0} --max-text 16 --steps 150 --batch-size 64 --lr 3e-3 --warmup 20")
_PAIRS = "--max-text 16 --batch-size 32 --steps 1350 --lr 1.5e-3 --warmup 20 --ema 0.99 --eval-every 450"
PRETRAINED = (_IMAGES, _TEXTS, ("vlmo", f"--data digits --from {{1}} {_PAIRS}"))
PROOF = Proof(
    PRETRAINED,
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.85),
        Claim("ITM accuracy (held-out)", "ITM accuracy", 0.85),
        Claim("cloze accuracy (held-out)", "cloze accuracy", 0.75),
    ],
)
TEXT_PROOF = Proof(
    [_IMAGES, _TEXTS],
    [Claim("cloze accuracy (held-out), of one in ten by text alone", "cloze accuracy", 0.05, 0.04, "untrained")],
)
