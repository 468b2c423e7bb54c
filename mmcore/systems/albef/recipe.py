"""ALBEF's recipe."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.data.text.masking import mask_tokens
from mmcore.data.text.wordpiece import WordPiece
from mmcore.fusion_recipe import CompletesTexts, FusionAssets, FusionBatch
from mmcore.losses import global_ratio, matching_loss, matching_rows, trimmed
from mmcore.ops import accumulator, distillation_loss
from mmcore.recipe import Claim, Proof, Runner, Step
from mmcore.systems.albef.align import Aligned, Pairs, words_of
from mmcore.systems.albef.model import ALBEF, ALBEFConfig
from mmcore.systems.albef.shapes import ALBEF_CONFIGS
from mmcore.systems.albef.weights import is_albef, load_albef, save_albef
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig

published = partial(
    OptimConfig, lr=1e-4, min_lr=1e-5, warmup_lr=1e-5, warmup=2000, beta2=0.999, eps=1e-8, weight_decay=0.02
)


def fitted(shape: ALBEFConfig, wordpiece: WordPiece) -> ALBEFConfig:
    """A shape for a vocabulary, less [DEC], which comes last."""
    sizes = {"vocab_size": wordpiece.vocab_size - 1, "pad_token_id": wordpiece.pad_token_id}
    return replace(shape, text=replace(shape.text, **sizes))


def read_start(path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]] | None:
    """The shape, the tokenizer and the weights in a published file or a folder of ours; None of anything else."""
    if not is_albef(path):
        return None
    model = load_albef(path)
    return model.config, words_of(path), dict(model.state_dict())


@dataclass(frozen=True)
class Albef(Aligned, CompletesTexts):
    """Train ALBEF (arXiv 2107.07651) on image-caption pairs: contrast with a momentum model, matching, masked words,
    each with what the momentum model finds among its targets."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=30, batch_size=64))
    optim: OptimConfig = field(default_factory=published)
    model: str = "tiny"
    """tiny, or base (ViT-B/16 of 256 pixels and BERT-base); with --from it is that one's."""
    max_text: int = 30
    """Tokens of a text, [CLS] and [SEP] included; 25 in pretraining as published."""
    mask_ends: bool = True
    """Hide [SEP] as if it were a word, as published."""

    shapes = ALBEF_CONFIGS
    kind = ALBEF
    tasks = ("zeroshot", "matching", "cloze", "retrieval")
    formats = ("albef",)

    def fitted(self, shape: ALBEFConfig, wordpiece: WordPiece) -> ALBEFConfig:
        return fitted(self.sized(shape), wordpiece)

    def read_start(self, path: Path) -> tuple[Any, WordPiece | None, dict[str, Tensor]]:
        return read_start(path) or super().read_start(path)

    def hidden(self, assets: FusionAssets, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        words = assets.wordpiece
        is_word = words.is_word(tokens)
        if self.mask_ends:
            is_word = is_word | (tokens == words.sep_token_id)
        assert words.mask_token_id is not None
        options: dict[str, Any] = {"mask_id": words.mask_token_id, "num_words": words.vocab_size - 1}
        return mask_tokens(tokens, is_word, self.mask_rate, np.random.default_rng(seed), **options)

    def loss(self, model: Runner, batch: FusionBatch, step: Step) -> dict[str, Tensor]:
        tokens = trimmed(batch.tokens, batch.num_text)
        masked, labels = (x[:, : tokens.shape[1]] for x in (batch.masked, batch.labels))
        inputs = batch.images, tokens, batch.num_text
        pairs: Pairs = model("pairs", *inputs)
        momentum: Pairs = self.by_momentum(model, step, "pairs", *inputs)
        negatives = self.negatives(pairs, momentum, batch, step)
        contrast = self.contrast(pairs, momentum, batch, step)
        rows = matching_rows(negatives, pairs.states, (pairs.words, batch.num_text))
        matched = model("match_read", pairs.keys_values, rows.more, rows.image_index, *rows.texts)
        words = self._words(model, pairs, momentum, (masked, batch.num_text), labels, step)
        losses = {"contrast": contrast, "matching": matching_loss(matched, rows.is_match), "words": words}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _words(
        self, model: Runner, pairs: Pairs, momentum: Pairs, texts: tuple[Tensor, Tensor], labels: Tensor, step: Step
    ) -> Tensor:
        """The mean over the hidden words of all ranks of (1 - alpha) times the cross-entropy and alpha times that with
        what the momentum model finds."""
        where, share = labels >= 0, self.share(step)
        logits = model("words", pairs.keys_values, *texts, where)
        wide = logits.to(accumulator(logits.dtype))
        total = F.cross_entropy(wide, labels[where], reduction="sum")
        if share > 0:
            found = self.by_momentum(model, step, "words", momentum.keys_values, *texts, where)
            total = (1 - share) * total + share * distillation_loss(wide, found, 1.0, 1.0, reduction="sum")
        return global_ratio(total, where.sum())

    def export(self, assets: FusionAssets, model: ALBEF, folder: Path, format: Literal["albef"]) -> None:
        save_albef(model, folder)
        assets.wordpiece.save(folder)


_NOISE = "--data digits --wrong-captions 0.4 --queue-size 256 --teacher-momentum 0.95 --batch-size 128 --lr 2e-3"
_NOISY = "(held-out), of 40 % wrong captions"
PROOF = Proof(
    [("albef", f"{_NOISE} --min-lr 8e-4 --queue-after 200 --alpha-steps 500 --epochs 41 --seed 2 --ema 0.98")],
    [
        Claim(f"zero-shot accuracy {_NOISY}", "zero-shot top-1", 0.85),
        Claim(f"the caption's own image above another's {_NOISY}", "ITM order", 0.85),
        Claim(f"cloze accuracy {_NOISY}", "cloze accuracy", 0.75),
    ],
)
_CLEAN = "--data digits --queue-size 256 --queue-after 150 --teacher-momentum 0.95 --batch-size 64 --lr 2e-3 --ema 0.98"
PROOF_MATCHING = Proof([("albef", f"{_CLEAN} --epochs 22")], [Claim("ITM accuracy (held-out)", "ITM accuracy", 0.85)])
