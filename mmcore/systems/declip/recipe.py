"""DeCLIP's recipe: CLIP of two views of images and captions, with three more losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.data import PairData
from mmcore.data.collate import PairSample, collate_pairs
from mmcore.data.text.masking import changed_text, mask_tokens
from mmcore.losses import global_contrastive_loss, global_ratio
from mmcore.nn import FeatureQueue
from mmcore.ops import require
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.clip.model import TextConfig, eos_positions
from mmcore.systems.clip.views import WithViews
from mmcore.systems.declip.model import MASKED, DeCLIP, DeclipBatch
from mmcore.tasks.projection import DEVIATION
from mmcore.train.optim import Rule
from mmcore.two_towers import PairAssets

NEAREST_ROWS = 256


class DeclipSample(NamedTuple):
    """A pair with its image in a first view, a second view, the caption changed, and what masks are drawn by."""

    pair: PairSample
    second: Tensor
    changed: str
    seed: int


@dataclass(frozen=True)
class Declip(WithViews):
    """Train DeCLIP (arXiv 2110.05208) on image-caption pairs: CLIP of two views each, nearest captions, SimSiam of the
    views and masked words, weighted 1 less the three others, and those."""

    view_scale: float = 0.2
    """Least share of an image's area that a view shows."""
    nearest_weight: float = 0.2
    """Of the contrast with the nearest of earlier captions."""
    siamese_weight: float = 0.2
    """Of SimSiam's loss between the views of an image."""
    words_weight: float = 0.2
    """Of the masked words of a caption."""
    mask_rate: float = 0.15
    """Share of a caption's words that is masked."""
    bank_size: int = 65_536
    """Captions whose embeddings are kept, to find the nearest among."""
    head_width: int = 1024
    """Width of SimSiam's projector; its predictor narrows to half of it."""

    kind = DeCLIP
    training_only = ("projector.", "predictor.", "words.", "text.mask_embedding")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("logit_scale", clamp=(3.0, 6.0)),)

    def assets(self, data: PairData) -> PairAssets:
        for flag, value, least in (("bank-size", self.bank_size, 1), ("head-width", self.head_width, 2)):
            require("declip", value >= least, "--{} must be at least {}, got {}", flag, least, value)
        require("declip", 0 < self.mask_rate <= 1, "--mask-rate must be in (0, 1], got {}", self.mask_rate)
        weights = self.nearest_weight, self.siamese_weight, self.words_weight
        fits = min(weights) >= 0 and sum(weights) < 1
        names = "--nearest-weight, --siamese-weight and --words-weight"
        require("declip", fits, "{} must be at least 0 and below 1 in all, got {}", names, weights)
        assets = super().assets(data)
        require("declip", isinstance(assets.shape.text, TextConfig), "--text must be left out, got {}", self.text)
        return assets

    def make(self, shape: Any) -> DeCLIP:
        return DeCLIP(shape, self.head_width, self.head_width // 2)

    def sample(self, assets: PairAssets, record: Any, rng: np.random.Generator) -> DeclipSample:  # pyright: ignore[reportIncompatibleMethodOverride]
        caption = record.caption(rng)
        first, second = self.views(assets, record, rng)
        pair = PairSample(first, caption, record.label(caption), record.image_id, record.question)
        return DeclipSample(pair, second, changed_text(caption, rng), int(rng.integers(2**62)))

    def collate(self, assets: PairAssets, samples: list[DeclipSample]) -> DeclipBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, text = collate_pairs([x.pair for x in samples], assets.tokenizer), assets.shape.text
        ends, places = eos_positions(batch.tokens, text.eos_token_id), torch.arange(batch.tokens.shape[1])
        is_word = (places > 0) & (places < ends[:, None])
        # the tokens that begin and end a caption come behind all words
        num_words = int(batch.tokens.gather(1, torch.stack([torch.zeros_like(ends), ends], 1)).min())
        hide = partial(mask_tokens, mask_id=MASKED, num_words=num_words)
        hidden = [
            hide(tokens, words, self.mask_rate, np.random.default_rng(x.seed))
            for tokens, words, x in zip(batch.tokens, is_word, samples, strict=True)
        ]
        tokens, labels = (torch.stack(x) for x in zip(*hidden, strict=True))
        second = torch.stack([x.second for x in samples])
        return DeclipBatch(batch.images, second, tokens, assets.tokenizer([x.changed for x in samples]), labels)

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        return {"bank": FeatureQueue(self.bank_size, model.module.config.embed_dim).to(model.device)}

    def features(self, model: Runner, batch: Any) -> tuple[Tensor, ...]:
        return model(*batch)

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        first, second, text, changed, siamese, masked, count, scale = features
        pairs = [(image, words) for image in (first, second) for words in (text, changed)]
        contrast = torch.stack([global_contrastive_loss(*pair, scale) for pair in pairs]).mean()
        losses = {
            "contrast": contrast,
            "nearest": self._nearest((first, second), (text, changed), scale, step),
            "siamese": global_ratio(siamese.sum(), torch.tensor(len(siamese), device=siamese.device)),
            "words": global_ratio(masked.sum(), count.sum()),
        }
        weights = {name: getattr(self, f"{name}_weight") for name in ("nearest", "siamese", "words")}
        weights["contrast"] = 1 - sum(weights.values())
        return {"loss": torch.stack([weights[name] * x for name, x in losses.items()]).sum(), **losses}

    def _nearest(self, images: Sequence[Tensor], texts: Sequence[Tensor], scale: Tensor, step: Step) -> Tensor:
        """Images against the nearest of earlier captions, none of this step; in the first, against their own."""
        found, bank = [x.detach() for x in texts], step.companions.get("bank")
        if isinstance(bank, FeatureQueue):  # a plan has none
            own, known = found, bank.filled
            found = [nearest(x, known) for x in own] if len(known) else own
            for x in reversed(own):
                bank.enqueue(x, group=dist.group.WORLD if dist.is_initialized() else None)
        losses = [global_contrastive_loss(x, y, scale, symmetric=False) for x in images for y in found]
        return torch.stack(losses).mean()


def nearest(rows: Tensor, known: Tensor) -> Tensor:
    """Of unit vectors [N, D] the one nearest to each row [B, D]."""
    places = [(part.to(known.dtype) @ known.T).argmax(1) for part in rows.split(NEAREST_ROWS)]
    return known[torch.cat(places)].to(rows.dtype)


PROOF = Proof(
    [
        (
            "declip",
            "--data digits --model tiny --head-width 128 --bank-size 1024 --view-scale 0.5 --view-flip 0 "
            "--mask-rate 0.3 --epochs 30 --lr 1e-3 --ema 0.99",
        )
    ],
    [
        Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.88),
        Claim("deviation of projections (held-out)", DEVIATION, 0.5, control=None),
    ],
)
