"""CoCa's recipe."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmcore.data import PairData
from mmcore.data.collate import collate_pairs
from mmcore.data.text.tokenizer import load_tokenizer
from mmcore.losses import global_contrastive_loss, global_ratio
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.settings import from_json, once
from mmcore.systems.clip.model import caption_lengths
from mmcore.systems.clip.recipe import ClipBatch, name_tokenizer
from mmcore.systems.coca.model import CoCa, CoCaConfig
from mmcore.systems.coca.shapes import coca_config
from mmcore.systems.coca.weights import SETTINGS, load_coca, save_coca
from mmcore.tasks.caption import NAMED
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.optim import OptimConfig, Rule
from mmcore.two_towers import OnBPE, PairAssets, fitted

_published = partial(OptimConfig, lr=8e-4, beta2=0.999, weight_decay=0.01, schedule="linear", warmup_share=0.02)


@dataclass(frozen=True)
class Coca(OnBPE):
    """Train CoCa (arXiv 2205.01917) on image-caption pairs: contrast of the global batch and captions."""

    optim: OptimConfig = field(default_factory=_published)
    model: str | None = field(default=None, metadata=once)
    """tiny, ViT-B-32 or ViT-L-14 (open_clip's); None = that of --init, or tiny."""
    init: Path | None = field(default=None, metadata=once)
    """Weights to start from: a folder of open_clip with a CoCa, or a file of its weights with --model."""
    contrast_weight: float = 1.0
    """Of the contrastive loss; 0 = captions alone, as open_clip fine-tunes for them."""
    caption_weight: float = 2.0
    """Of the captions' loss, a mean over all their words."""
    correct_cls_mask: bool = field(default=False, metadata=once)
    """A caption's class token sees the caption and itself; --no-correct-cls-mask: one place of the padding and itself
    only where there is none, as in open_clip's models, which alone can be exported to it."""
    pads_by_id: bool = field(default=False, metadata=once)
    """Tokens of id 0 are padding wherever they stand, as in open_clip, though CLIP's "!" before another sign is one;
    --no-pads-by-id: what is behind the end token is padding."""

    kind = CoCa
    tasks = ("zeroshot", "caption", "retrieval", "crosslingual")
    formats = ("open_clip",)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("logit_scale", clamp=(0.0, math.log(100.0))),)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": None}

    def assets(self, data: PairData) -> PairAssets:
        weights = self.contrast_weight, self.caption_weight
        fits = min(weights) >= 0 and max(weights) > 0
        what = "--contrast-weight and --caption-weight must be at least 0 and not both 0, got {}"
        require("coca", fits, what, weights)
        shape = coca_config(self.model or "tiny") if self.init is None else self._start().config
        tokenizer, origin = self.choose_tokenizer(shape.text, data)
        size = tokenizer.vocab_size if self.init is None else shape.text.vocab_size
        flags = {"correct_cls_mask": self.correct_cls_mask, "pads_by_id": self.pads_by_id}
        return PairAssets(
            replace(shape, text=fitted(shape.text, tokenizer, size), **flags), tokenizer, origin, self.init
        )

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Any
    ) -> PairAssets:
        return PairAssets(from_json(CoCaConfig, saved), load_tokenizer(folder / "tokenizer"))

    def build(self, assets: PairAssets) -> CoCa:
        model = CoCa(assets.shape)
        model.set_activation_checkpointing(self.activation_checkpointing)
        model.train()
        return model

    def initial(self, assets: PairAssets, model: CoCa) -> Mapping[str, Tensor]:
        return {} if self.init is None else self._start().state_dict()

    def _start(self) -> CoCa:
        """What --init holds; a ValueError where --model is given beside a configuration, which tells it."""
        assert self.init is not None
        beside = (self.init if self.init.is_dir() else self.init.parent) / SETTINGS.what
        is_one = self.model is None or not beside.is_file()
        require(
            "coca",
            is_one,
            "--model must be left out with --init, beside which lies {}, got {}",
            SETTINGS.what,
            self.model,
        )
        return load_coca(self.init, config=None if self.model is None else coca_config(self.model))

    def collate(self, assets: PairAssets, samples: list[Any]) -> ClipBatch:
        batch = collate_pairs(samples, assets.tokenizer)
        return ClipBatch(batch.images, batch.tokens, caption_lengths(batch.tokens, assets.shape.text.eos_token_id))

    def features(self, model: Runner, batch: Any) -> tuple[Tensor, ...]:
        return model(batch.images, batch.tokens, batch.lengths)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        image, text, total, count, scale = features
        losses = {
            "contrast": global_contrastive_loss(image, text, scale),
            "caption": global_ratio(total.sum(), count.sum()),
        }
        return {"loss": self.contrast_weight * losses["contrast"] + self.caption_weight * losses["caption"], **losses}

    def speaks(self, assets: PairAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        tokenizer = assets.tokenizer
        options = {"eos_token_id": tokenizer.eos_token_id, **decoding.options()}

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            (prompt,) = {*prompts}  # a caption's has no question in it
            tokens = tokenizer([prompt])[0]
            start = tokens[: caption_lengths(tokens[None], tokenizer.eos_token_id)[0] - 1].to(device)
            ids = model(assets.preprocess(images).to(device), generate={"prompt": start, **options})
            return [tokenizer.decode(row) for row in ids.tolist()]

        return say

    def export(self, assets: PairAssets, model: CoCa, folder: Path, format: str) -> None:
        save_coca(model, folder)
        assets.tokenizer.save(folder)
        name_tokenizer(folder, assets.tokenizer)


PROOF = Proof(
    [("coca", "--data digits --model tiny --batch-size 128 --epochs 24 --lr 1e-3 --ema 0.99")],
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.88),
        Claim("captions that name the class (held-out)", NAMED, 0.85),
    ],
)
