"""SigLIP's recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mmcore.data import PairData
from mmcore.losses import global_sigmoid_loss
from mmcore.ops import require
from mmcore.parts.padded import load_padded_tokenizer, padded_tokenizer
from mmcore.recipe import Claim, Proof, Step
from mmcore.settings import from_json, once
from mmcore.systems.siglip.model import SigLIP, SigLIPConfig
from mmcore.systems.siglip.shapes import siglip_config
from mmcore.systems.siglip.weights import load_siglip, save_siglip
from mmcore.train.optim import OptimConfig
from mmcore.two_towers import PairAssets, TwoTowers, check_same_tokenizer

# big_vision takes 1e-4 of a weight off apart from the learning rate, which at 1e-3 is AdamW's 0.1
_published = partial(OptimConfig, lr=1e-3, beta2=0.95, eps=1e-8, weight_decay=0.1, warmup=20_000)


@dataclass(frozen=True)
class Siglip(TwoTowers):
    """Train SigLIP (arXiv 2303.15343) on image-caption pairs, with the sigmoid loss of all pairs of the batch."""

    optim: OptimConfig = field(default_factory=_published)
    model: str | None = field(default=None, metadata=once)
    """tiny, or tower, patch and pixels as published: B-16-224, L-16-256, So400m-14-384; None = that of --init,
    or tiny."""
    tokenizer: Path | None = field(default=None, metadata=once)
    """A folder with tokenizer.json (SigLIP's, or Gemma's for SigLIP 2); None = that of --init, or one is trained."""
    init: Path | None = field(default=None, metadata=once)
    """Weights and shape to start from: a folder of transformers with SigLIP or SigLIP 2 (safetensors)."""

    kind = SigLIP
    config: ClassVar[type[SigLIPConfig]] = SigLIPConfig
    shape: ClassVar[Callable[[str], Any]] = staticmethod(siglip_config)
    """By a name."""
    start: ClassVar[Callable[[Path], Any]] = staticmethod(load_siglip)
    """What --init names."""
    formats = ("hf",)

    def assets(self, data: PairData) -> PairAssets:
        op, is_one = type(self).__name__.lower(), self.init is None or self.model is None
        require(op, is_one, "--model must be left out with --init, got {}", self.model)
        shape = self.shape(self.model or "tiny") if self.init is None else self.start(self.init).config
        length, most = shape.text.context_length, shape.text.vocab_size
        captions = partial(data.captions, self.tokenizer_samples, self.run.seed)
        tokenizer = padded_tokenizer(self.tokenizer or self.init, captions, most, length)
        if self.init is not None and self.tokenizer is not None and (self.init / "tokenizer.json").is_file():
            check_same_tokenizer(tokenizer, load_padded_tokenizer(self.init, length), self.tokenizer, self.init)
        if self.init is None:
            most = tokenizer.vocab_size
        fits = tokenizer.vocab_size <= most
        require(op, fits, "--tokenizer must have at most {} tokens, got {}", most, tokenizer.vocab_size)
        folder = self.tokenizer or self.init
        origin = f"of {folder}" if folder else "learned from captions"
        return PairAssets(replace(shape, text=replace(shape.text, vocab_size=most)), tokenizer, origin, self.init)

    def load_assets(
        self, folder: Path, saved: Mapping[str, Any], frozen: Mapping[str, Tensor], purpose: Any
    ) -> PairAssets:
        shape = from_json(self.config, saved)
        return PairAssets(shape, load_padded_tokenizer(folder / "tokenizer", shape.text.context_length))

    def initial(self, assets: PairAssets, model: SigLIP) -> Mapping[str, Tensor]:
        return {} if self.init is None else self.start(self.init).state_dict()

    def objective(self, features: tuple[Tensor, ...], parts: Sequence[Any], step: Step) -> dict[str, Tensor]:
        return {"loss": global_sigmoid_loss(*features)}

    def export(self, assets: PairAssets, model: SigLIP, folder: Path, format: str) -> None:
        save_siglip(model, folder)
        assets.tokenizer.save(folder)


PROOF = Proof(
    [("siglip", "--data digits --model tiny --batch-size 32 --lr 5e-4 --epochs 20 --ema 0.98")],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.9)],
)
