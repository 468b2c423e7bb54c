"""BLIP's recipes: pretraining, and what follows it: captions, retrieval, answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.collate import collate_pairs
from mmcore.data.text.wordpiece import WordPiece
from mmcore.fusion_recipe import FusionAssets, FusionBatch, FusionRecipe, FusionSample
from mmcore.losses import global_ratio, matching_loss, matching_rows, trimmed
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.albef.align import Aligned, Pairs, Resizes, words_of
from mmcore.systems.albef.answers import SaysAnswers
from mmcore.systems.blip.model import BLIP, BLIPConfig, Kind, fitting
from mmcore.systems.blip.shapes import BLIP_CONFIGS
from mmcore.systems.blip.weights import is_blip, load_blip, save_blip
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

PROMPT = "a picture of "
LEAST_PROBABILITY = 1e-4
_settings: dict[str, Any] = {"beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05}
_pretraining = partial(OptimConfig, lr=3e-4, min_lr=1e-6, warmup_lr=1e-6, warmup=3000, **_settings)
_tuning = partial(OptimConfig, lr=1e-5, warmup=0, **_settings)


@dataclass(frozen=True)
class OfBlip(Resizes):
    """Mixin: a BLIP of one kind."""

    model: str = "tiny"
    """tiny, base (ViT-B/16 of 224 pixels and BERT-base) or large (ViT-L/16); with --from it is that one's."""

    shapes = BLIP_CONFIGS
    kind = BLIP
    part: ClassVar[Kind] = "pretrain"
    formats = ("hf",)

    def fitted(self, shape: BLIPConfig, wordpiece: WordPiece) -> BLIPConfig:
        # [ENC] is behind the words and [DEC]
        sizes = {"vocab_size": wordpiece.vocab_size + 1, "pad_token_id": wordpiece.pad_token_id}
        ids = {"decoder_token_id": wordpiece.decoder_token_id, "encoder_token_id": wordpiece.vocab_size}
        text = replace(shape.text, **sizes)
        return replace(self.sized(shape), text=text, kind=self.part, end_token_id=wordpiece.sep_token_id, **ids)

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        if not is_blip(path):
            return super().read_start(path)
        model = load_blip(path)
        return model.config, words_of(path), dict(model.state_dict())

    def started(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return fitting(state, self.part)

    def export(self, assets: FusionAssets, model: BLIP, folder: Path, format: Literal["hf"]) -> None:
        save_blip(model, folder)
        assets.wordpiece.save(folder)


class CaptionBatch(NamedTuple):
    """Captions behind a prompt."""

    images: Tensor  # uint8 [B, 3, S, S]
    tokens: Tensor  # int64 [B, T]
    num_text: Tensor  # int64 [B]
    num_prompt: int  # tokens of the prompt and what is before it


@dataclass(frozen=True)
class Describes(FusionRecipe):
    """Mixin: writes captions behind a prompt, which is not learned."""

    prompt: str = ""
    """Text that every caption begins with."""
    min_caption: int = 0
    """Fewest tokens of a caption that is written, [DEC] and the prompt included, the end not; as published 5."""
    max_caption: int = 20
    """Most of them, as published."""

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": self.prompt}

    def texts(self, data: PairData) -> Sequence[str]:
        return [*super().texts(data), *([self.prompt] if self.prompt else [])]

    def assets(self, data: PairData) -> FusionAssets:
        require(self.name, "{" not in self.prompt, "--prompt must hold no {{, got {!r}", self.prompt)
        found = super().assets(data)
        first, most = self.num_prompt(found.wordpiece, self.prompt), found.shape.text.num_positions
        fits = first < self.max_caption <= most
        require(self.name, fits, "--max-caption must be from {} to {}, got {}", first + 1, most, self.max_caption)
        fits = 0 <= self.min_caption < self.max_caption
        require(self.name, fits, "--min-caption must be from 0, below --max-caption, got {}", self.min_caption)
        return found

    @staticmethod
    def num_prompt(words: WordPiece, prompt: str) -> int:
        """Tokens of a prompt and the [DEC] before it."""
        return len(words([prompt], 512).tokens[0]) - 1

    def speaks(self, assets: FusionAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            found = [""] * len(images)
            for prompt in dict.fromkeys(prompts):  # of one length each
                rows = [i for i, x in enumerate(prompts) if x == prompt]
                some = self._said(assets, model, device, [images[i] for i in rows], prompt, **decoding.options())
                for row, text in zip(rows, some, strict=True):
                    found[row] = text
            return found

        return say

    def samples(
        self, assets: FusionAssets, model: Runner, device: torch.device, top_p: float, seed: int
    ) -> Callable[[Sequence[Image.Image], Sequence[int]], list[str]]:
        """Images and numbers that name them to captions drawn from the nucleus, by random numbers of each image's
        name."""

        def drawn(images: Sequence[Image.Image], names: Sequence[int]) -> list[str]:
            numbers = [np.random.default_rng([seed, name]).random(self.max_caption) for name in names]
            uniform = torch.from_numpy(np.stack(numbers)).to(device)
            return self._said(assets, model, device, images, self.prompt, top_p=top_p, uniform=uniform)

        return drawn

    def _said(
        self,
        assets: FusionAssets,
        model: Runner,
        device: torch.device,
        images: Sequence[Image.Image],
        prompt: str,
        **options: Any,
    ) -> list[str]:
        words = assets.wordpiece
        start = words([prompt] * len(images), 512).tokens[:, :-1].to(device)
        options |= {"max_length": self.max_caption, "min_length": self.min_caption, "eos_token_id": words.sep_token_id}
        ids = model("describe", assets.preprocess(images).to(device), start, **options)
        return [words.decode(row) for row in ids.tolist()]


@dataclass(frozen=True)
class Matched(Aligned, OfBlip):
    """Mixin: contrast and matching as BLIP has them."""

    queue_size: int = 57_600
    """Pairs whose momentum features are kept."""

    ramp_epochs = 2
    tasks = ("zeroshot", "retrieval", "matching")

    def loss(self, model: Runner, batch: FusionBatch, step: Step) -> dict[str, Tensor]:
        return self.aligned(model, batch, step)[0]

    def aligned(
        self, model: Runner, batch: FusionBatch, step: Step
    ) -> tuple[dict[str, Tensor], Pairs, tuple[Tensor, Tensor]]:
        """Losses with their sum, what the towers made, and the texts."""
        texts = trimmed(batch.tokens, batch.num_text), batch.num_text
        pairs: Pairs = model("pairs", batch.images, *texts)
        momentum: Pairs = self.by_momentum(model, step, "pairs", batch.images, *texts)
        negatives = self.negatives(pairs, momentum, batch, step, least=LEAST_PROBABILITY)
        contrast = self.contrast(pairs, momentum, batch, step)
        rows = matching_rows(negatives, pairs.states, texts)
        matched = model("match_read", pairs.keys_values, rows.more, rows.image_index, *rows.texts)
        matching = matching_loss(matched, rows.is_match)
        return {"loss": contrast + matching, "contrast": contrast, "matching": matching}, pairs, texts


@dataclass(frozen=True)
class Blip(Describes, Matched):
    """Train BLIP (arXiv 2201.12086) on image-caption pairs: contrast with a momentum model, matching, captions."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=20, batch_size=75))
    optim: OptimConfig = field(default_factory=_pretraining)
    max_text: int = 30
    """Tokens of a text, [CLS] and [SEP] included."""

    tasks = ("zeroshot", "matching", "caption", "retrieval")

    def loss(self, model: Runner, batch: FusionBatch, step: Step) -> dict[str, Tensor]:
        losses, pairs, texts = self.aligned(model, batch, step)
        captions = global_ratio(*model("captions", pairs.keys_values, *texts))
        return {**losses, "loss": losses["loss"] + captions, "captions": captions}


@dataclass(frozen=True)
class BlipRetrieval(Matched):
    """Train BLIP's contrast and matching alone (arXiv 2201.12086), all texts of an image being right, from a run of
    blip or a folder of transformers: for retrieval, or as the filter of mmcore capfilt."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=6, batch_size=32))
    optim: OptimConfig = field(default_factory=_tuning)
    positives: Literal["pair", "image"] = "image"
    """What contrast pulls together: a text and its own image, or image = all texts of an image, for retrieval."""
    max_text: int = 35
    """Tokens of a text, [CLS] and [SEP] included."""

    part = "retrieval"


@dataclass(frozen=True)
class BlipCaption(Describes, OfBlip):
    """Train BLIP to write captions (arXiv 2201.12086), from a run of blip or a folder of transformers."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=5, batch_size=32))
    optim: OptimConfig = field(default_factory=_tuning)
    prompt: str = PROMPT
    """Text that every caption begins with."""
    min_caption: int = 5
    """Fewest tokens of a caption that is written, [DEC] and the prompt included, the end not; as published 5."""
    max_text: int = 40
    """Tokens of a caption, the prompt, [CLS] and [SEP] included."""

    part = "caption"
    tasks = ("caption",)

    def collate(self, assets: FusionAssets, samples: list[FusionSample]) -> CaptionBatch:
        batch = collate_pairs([x.pair for x in samples])
        texts = assets.wordpiece.padded([self.prompt + caption for caption in batch.captions], self.max_text)
        return CaptionBatch(batch.images, *texts, self.num_prompt(assets.wordpiece, self.prompt))

    def loss(self, model: Runner, batch: CaptionBatch, step: Step) -> dict[str, Tensor]:
        texts = trimmed(batch.tokens, batch.num_text), batch.num_text
        return {"loss": global_ratio(*model("captions", batch.images, *texts, batch.num_prompt))}


@dataclass(frozen=True)
class BlipVqa(SaysAnswers, OfBlip):
    """Train BLIP to answer questions (arXiv 2201.12086) in words, from a run of blip or a folder of transformers."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=10, batch_size=16))
    optim: OptimConfig = field(default_factory=partial(_tuning, lr=2e-5))
    max_text: int = 35
    """Tokens of a question, [CLS] and [SEP] included."""

    part = "vqa"

    def started(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().started(state)
        read, width = found["visual.class_embedding"], found["text.norm.weight"]
        if read.shape == width.shape:
            return found
        # the decoder reads states of questions, not of a wider image tower: those begin anew, as published
        return {name: x for name, x in found.items() if not (name.startswith("decoder.") and ".cross.kv." in name)}


_DIGITS = "--data digits --batch-size 64"
_START = f"{_DIGITS} --queue-size 256 --queue-after 150 --teacher-momentum 0.95 --lr 2e-3 --ema 0.98"
_FROM = f"{_DIGITS} --from {{0}} --epochs 6 --lr 1e-3 --ema 0.98"
_CAPTIONS = Claim("captions that name the class (held-out)", "class named", 0.85)
_MATCHING = Claim("ITM accuracy (held-out)", "ITM accuracy", 0.85)
PROOF = Proof([("blip", f"{_START} --epochs 24")], [_CAPTIONS, _MATCHING])
_BEGIN = ("blip", f"{_START} --epochs 16")
PROOF_CAPTION = Proof([_BEGIN, ("blip-caption", _FROM)], [_CAPTIONS])
PROOF_RETRIEVAL = Proof(
    [_BEGIN, ("blip-retrieval", f"{_FROM} --queue-size 256 --random-queue --teacher-momentum 0.95")], [_MATCHING]
)
PROOF_VQA = Proof([_BEGIN, ("blip-vqa", _FROM)], [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.80)])
