"""ALIGN's recipe."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.data import PairData
from mmcore.losses import global_contrastive_loss
from mmcore.ops import require
from mmcore.parts.bert import BertConfig
from mmcore.parts.foreign import ForeignVision
from mmcore.parts.padded import learned_wordpiece, load_folder_tokenizer
from mmcore.recipe import Claim, Proof, Step
from mmcore.settings import from_json, once
from mmcore.systems.align.model import ALIGN
from mmcore.systems.align.weights import load_align, save_align
from mmcore.systems.clip.given import check_flags, given_towers
from mmcore.systems.clip.model import TowersConfig
from mmcore.systems.clip.recipe import Clip, ClipBatch
from mmcore.train.optim import OptimConfig, Rule
from mmcore.two_towers import PairAssets

_published = partial(OptimConfig, lr=1e-3, beta2=0.999, weight_decay=1e-5, schedule="linear")
_KIND = {"model_type": "align_vision_model", "drop_connect_rate": 0.0}
_KIND = {"model_type": "align_vision_model", "drop_connect_rate": 0.0}
_TINY: dict[str, Any] = {
    **_KIND, "image_size": 16, "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3, 3, 3],
    "in_channels": [32, 32, 48], "out_channels": [32, 48, 64], "strides": [1, 2, 2], "num_block_repeats": [1, 1, 1],
    "expand_ratios": [1, 4, 4], "hidden_dim": 64, "batch_norm_momentum": 0.9,
}  # fmt: skip
_BASE: dict[str, Any] = {**_KIND, "image_size": 289, "hidden_dim": 640}
# the image tower of a name, and the text tower
ALIGN_CONFIGS = {
    "tiny": (ForeignVision("transformers", _TINY, 64, 16), BertConfig(1024, 32, 128, 3, 4, 512, num_positions=32)),
    "base": (ForeignVision("transformers", _BASE, 640, 289), BertConfig()),
}


@dataclass(frozen=True)
class Align(Clip):
    """Train ALIGN (arXiv 2102.05918): any image module and BERT, contrast under a learned temperature."""

    optim: OptimConfig = field(default_factory=_published)
    model: str | None = field(default=None, metadata=once)
    """tiny, or base (EfficientNet-B7 and BERT-base, as kakaobrain's); None = that of --init, or tiny."""
    tokenizer: str | None = field(default=None, metadata=once)
    """A folder of transformers with a WordPiece tokenizer; None = that of --text or --init, or one is learned."""
    init: Path | None = field(default=None, metadata=once)
    """Weights, shape and tokenizer to start from: a folder of transformers with an AlignModel (safetensors)."""
    image_head: bool = False
    """Project what the image tower gives; --no-image-head: texts are projected to its width, as published."""

    kind = ALIGN
    formats = ("hf",)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return ()

    def check(self) -> None:
        """Raises a ValueError for flags that contradict each other."""
        # an image head is off unless it is asked for, with whatever tower
        check_flags(replace(self, image_head=True))

    def _assets(self, data: PairData) -> PairAssets:
        is_one = self.init is None or self.model is None
        require("align", is_one, "--model must be left out with --init, got {}", self.model)
        if self.init is not None:
            shape = load_align(self.init).config
        else:
            name, known = self.model or "tiny", ", ".join(ALIGN_CONFIGS)
            require("align", name in ALIGN_CONFIGS, "--model must be one of {}, got {!r}", known, name)
            vision, text = ALIGN_CONFIGS[name]
            of_image, of_text = given_towers(self)
            config, pool = (vision, "class") if of_image is None else of_image[:2]
            shape = TowersConfig(
                config.width, config, text if of_text is None else of_text.config, 0.0, pool, self.image_head
            )
        folder = Path(self.tokenizer) if self.tokenizer else self.text or self.init
        length, most = shape.text.context_length, shape.text.vocab_size
        if folder is not None:
            tokenizer, origin = load_folder_tokenizer(folder, length), f"of {folder}"
        else:
            captions = data.captions(self.tokenizer_samples, self.run.seed)
            tokenizer, origin = learned_wordpiece(captions, most, length), f"learned from {len(captions)} captions"
        if self.text is None and self.init is None:
            shape = replace(shape, text=replace(shape.text, vocab_size=tokenizer.vocab_size))
        fits = tokenizer.vocab_size <= shape.text.vocab_size
        require("align", fits, "--tokenizer must have at most {} tokens, got {}", most, tokenizer.vocab_size)
        return PairAssets(shape, tokenizer, origin, self.init)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Any
    ) -> PairAssets:
        shape = from_json(TowersConfig, saved)
        return PairAssets(shape, load_folder_tokenizer(folder / "tokenizer", shape.text.context_length), frozen=frozen)

    def _start(self) -> ALIGN:
        assert self.init is not None
        return load_align(self.init)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[ClipBatch], step: Step) -> dict[str, Tensor]:
        image, text, scale = features
        if scale.is_cpu:
            fits, temperature = 0 < scale.item() < math.inf, (1 / scale).item()
            require("align", fits, "the temperature must stay above 0, got {}: lower --lr", temperature)
        else:  # not waited for: a loss that is no number stops the run too
            scale = torch.where(scale > 0, scale, torch.nan)
        return {"loss": global_contrastive_loss(image, text, scale, label_smoothing=0.1)}

    def export(self, assets: PairAssets, model: Any, folder: Path, format: Any) -> None:
        save_align(model, folder)
        assets.tokenizer.save(folder)


PROOF = Proof(
    [("align", "--data digits --model tiny --batch-size 128 --epochs 15 --lr 3e-3 --layer-decay 0.3 --ema 0.98")],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.85)],
)
