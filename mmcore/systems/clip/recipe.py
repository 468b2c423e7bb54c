"""CLIP's recipe."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmcore.data import PairData, Preprocess
from mmcore.data.collate import PairSample, collate_pairs
from mmcore.data.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mmcore.losses import global_contrastive_loss
from mmcore.parts.vit import Tower, VisionConfig
from mmcore.recipe import Assets, Claim, Contrastive, Embeds, OnPairs, Proof, Runner, Step
from mmcore.settings import free
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextConfig, caption_lengths
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.clip.weights import Format, load_clip, save_clip
from mmcore.train.optim import Rule


@dataclass(frozen=True)
class ClipAssets(Assets):
    """The model's shape, and what makes tokens of captions."""

    shape: CLIPConfig
    tokenizer: Tokenizer

    @property
    def preprocess(self) -> Preprocess:
        return self.shape.vision.preprocess

    def save(self, folder: Path) -> dict[str, Any]:
        self.tokenizer.save(folder / "tokenizer")
        return asdict(self.shape)


class ClipBatch(NamedTuple):
    """Images uint8 [B, 3, S, S], tokens int64 [B, T], and how many of each caption's count."""

    images: Tensor
    tokens: Tensor
    lengths: list[int]


@dataclass(frozen=True)
class Clip(OnPairs, Contrastive):
    """Train CLIP (arXiv 2103.00020) on image-caption pairs, with the contrastive loss of the global batch."""

    model: str = "tiny"
    """tiny, small, ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336; with -quickgelu for OpenAI's weights."""
    tokenizer: Path | None = None
    """CLIP's BPE files (a folder with vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab_16e6.txt.gz);
    None = one is trained on the captions."""
    init: Path | None = None
    """Weights to start from: a file or folder of transformers or open_clip (safetensors, or .pt read weights-only)."""
    activation_checkpointing: bool = field(default=False, metadata=free)
    """Recompute activations in the backward: less memory, about a third more time."""

    tasks = ("zeroshot", "retrieval")
    formats = ("hf", "open_clip")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("logit_scale", clamp=(0.0, math.log(100.0))),)

    def assets(self, data: PairData) -> ClipAssets:
        wanted = clip_config(self.model).text
        sizes: Any = {"context_length": wanted.context_length}
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer, **sizes)
        else:
            tokenizer = train_tokenizer(list(data.captions()), vocab_size=wanted.vocab_size, **sizes)
        names = ("vocab_size", "context_length", "eos_token_id")
        shape = clip_config(self.model, **{name: getattr(tokenizer, name) for name in names})
        self._initial(shape)
        return ClipAssets(shape, tokenizer)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Any
    ) -> ClipAssets:
        towers = {"vision": VisionConfig(**saved["vision"]), "text": TextConfig(**saved["text"])}
        return ClipAssets(CLIPConfig(**{**saved, **towers}), load_tokenizer(folder / "tokenizer"))

    def build(self, assets: ClipAssets) -> CLIP:
        model = CLIP(assets.shape)
        model.set_activation_checkpointing(self.activation_checkpointing)
        return model

    def initial(self, assets: ClipAssets, model: CLIP) -> Mapping[str, Tensor]:
        return self._initial(assets.shape)

    def _initial(self, shape: CLIPConfig) -> Mapping[str, Tensor]:
        if self.init is None:
            return {}
        loaded = load_clip(self.init, image_size=shape.vision.image_size)
        for part in ("vision", "text"):
            theirs, ours = (asdict(getattr(config, part)) for config in (loaded.config, shape))
            differ = [n for n in ours if n != "eos_token_id" and theirs[n] != ours[n]]
            if differ:
                n = differ[0]
                wanted = f"a CLIP whose {part} tower has {n} {ours[n]!r}, as --model {self.model} and the tokenizer"
                raise ValueError(f"--init must be {wanted} have it, got {theirs[n]!r} in {self.init}")
        return loaded.state_dict()

    def collate(self, assets: ClipAssets, samples: list[PairSample]) -> ClipBatch:
        batch = collate_pairs(samples, assets.tokenizer)
        return ClipBatch(batch.images, batch.tokens, caption_lengths(batch.tokens, assets.shape.text.eos_token_id))

    def features(self, model: Runner, batch: ClipBatch) -> tuple[Tensor, ...]:
        return model(*batch)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[ClipBatch], step: Step) -> dict[str, Tensor]:
        image, text, scale = features
        return {"loss": global_contrastive_loss(image, text, scale)}

    def embeds(self, assets: ClipAssets, model: Runner, device: torch.device) -> Embeds:
        def image(images: Tensor) -> Tensor:
            return model(images, None)[0]

        def text(captions: list[str]) -> Tensor:
            return model(None, assets.tokenizer(captions).to(device))[1]

        return Embeds(assets.preprocess, image, lambda features: features, text)

    def image_tower(self, assets: ClipAssets, model: CLIP) -> Tower:
        return model.image_tower()

    def export(self, assets: ClipAssets, model: CLIP, folder: Path, format: Format) -> dict[str, Any]:
        save_clip(model, folder, format=format)
        assets.tokenizer.save(folder)
        return assets.preprocess.processor()


PROOF = Proof(
    [("clip", "--data digits --model tiny --epochs 30 --lr 1e-3 --ema 0.99")],
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.9),
        Claim("text to image R@1 (held-out)", "text to image R@1", 0.5),
    ],
)
