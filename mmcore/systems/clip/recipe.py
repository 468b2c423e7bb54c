"""CLIP's recipe."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mmcore.data import PairData
from mmcore.data.collate import PairSample, collate_pairs
from mmcore.data.text.tokenizer import load_tokenizer, train_tokenizer
from mmcore.losses import global_contrastive_loss
from mmcore.recipe import Claim, PairAssets, Proof, Step, TwoTowers
from mmcore.settings import from_json
from mmcore.systems.clip.model import CLIP, CLIPConfig, caption_lengths
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.clip.weights import Format, load_clip, save_clip
from mmcore.train.optim import Rule


class ClipBatch(NamedTuple):
    """Images uint8 [B, 3, S, S], tokens int64 [B, T], and how many of each caption's count."""

    images: Tensor
    tokens: Tensor
    lengths: list[int]


@dataclass(frozen=True)
class Clip(TwoTowers):
    """Train CLIP (arXiv 2103.00020) on image-caption pairs, with the contrastive loss of the global batch."""

    model: str = "tiny"
    """tiny, small, ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336; with -quickgelu for OpenAI's weights."""
    tokenizer: Path | None = None
    """CLIP's BPE files (a folder with vocab.json and merges.txt, tokenizer.json, or bpe_simple_vocab_16e6.txt.gz);
    None = one is trained on the captions."""
    init: Path | None = None
    """Weights to start from: a file or folder of transformers or open_clip (safetensors, or .pt read weights-only)."""

    kind = CLIP
    formats = ("hf", "open_clip")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("logit_scale", clamp=(0.0, math.log(100.0))),)

    def assets(self, data: PairData) -> PairAssets:
        wanted = clip_config(self.model).text
        sizes: Any = {"context_length": wanted.context_length}
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer, **sizes)
        else:
            tokenizer = train_tokenizer(list(data.captions()), vocab_size=wanted.vocab_size, **sizes)
        names = ("vocab_size", "context_length", "eos_token_id")
        shape = clip_config(self.model, **{name: getattr(tokenizer, name) for name in names})
        self._initial(shape)
        return PairAssets(shape, tokenizer)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Any
    ) -> PairAssets:
        return PairAssets(from_json(CLIPConfig, saved), load_tokenizer(folder / "tokenizer"))

    def initial(self, assets: PairAssets, model: CLIP) -> Mapping[str, Tensor]:
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

    def collate(self, assets: PairAssets, samples: list[PairSample]) -> ClipBatch:
        batch = collate_pairs(samples, assets.tokenizer)
        return ClipBatch(batch.images, batch.tokens, caption_lengths(batch.tokens, assets.shape.text.eos_token_id))

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[ClipBatch], step: Step) -> dict[str, Tensor]:
        image, text, scale = features
        return {"loss": global_contrastive_loss(image, text, scale)}

    def export(self, assets: PairAssets, model: CLIP, folder: Path, format: Format) -> dict[str, Any]:
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
