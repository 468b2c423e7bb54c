"""BEiT-3 fine-tuned: retrieval by contrast, captions word by word, answers by a classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.text.masking import mask_tokens
from mmcore.fusion_recipe import AnswerBatch, AnswersQuestions, FusionAssets, FusionBatch
from mmcore.losses import global_contrastive_loss, global_ratio, trimmed
from mmcore.ops import require
from mmcore.parts.answers import answer_loss
from mmcore.recipe import Claim, Embeds, Proof, Runner, Step
from mmcore.systems.beit3.recipe import PRETRAINED, PUBLISHED, OnBeit3
from mmcore.tasks.speaking import Answerer, Decoding
from mmcore.train.config import RunConfig
from mmcore.train.optim import OptimConfig, Rule

_tuned = partial(PUBLISHED, beta2=0.999, eps=1e-8)


@dataclass(frozen=True)
class Beit3Retrieval(OnBeit3):
    """Train BEiT-3 for retrieval (arXiv 2208.10442): CLIP's loss of images and texts apart, from a run of beit3."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=15))
    optim: OptimConfig = field(default_factory=partial(_tuned, lr=2e-4, warmup_share=0.2))

    tasks = ("zeroshot", "retrieval")
    ends_in = "retrieval"

    def loss(self, model: Runner, batch: FusionBatch, step: Step) -> dict[str, Tensor]:
        tokens = trimmed(batch.tokens, batch.num_text)
        image, text, scale = model("pairs", batch.images, tokens, batch.num_text)
        return {"loss": global_contrastive_loss(image, text, scale)}

    def embeds(self, assets: FusionAssets, model: Runner, device: torch.device) -> Embeds:
        def text(captions: list[str]) -> Tensor:
            return model("embed_text", *self.padded(assets, captions, device))

        return Embeds(assets.preprocess, partial(model, "embed_image"), lambda features: features, text)


@dataclass(frozen=True)
class Beit3Caption(OnBeit3):
    """Train BEiT-3 to describe images (arXiv 2208.10442): hidden words of captions, each by the image and the words
    before it, from a run of beit3."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=10))
    optim: OptimConfig = field(default_factory=partial(_tuned, lr=4e-5))
    text_mask_ratio: float = 0.7
    """Share of the words that are hidden, the end among them."""
    label_smoothing: float = 0.1
    """Share of the target that all other words have."""

    tasks = ("caption",)
    ends_in = "captioning"

    @property
    def prompts(self) -> Mapping[str, str | None]:
        return {"caption": None}

    def assets(self, data: Any) -> FusionAssets:
        share, smoothing = self.text_mask_ratio, self.label_smoothing
        require(self.name, 0 < share <= 1, "--text-mask-ratio must be in (0, 1], got {}", share)
        require(self.name, 0 <= smoothing < 1, "--label-smoothing must be from 0, below 1, got {}", smoothing)
        return super().assets(data)

    def hidden(self, assets: FusionAssets, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        words = assets.wordpiece
        assert words.mask_token_id is not None
        is_word = words.is_word(tokens) | (tokens == words.sep_token_id)
        options = {"mask_id": words.mask_token_id, "num_words": words.vocab_size - 1, "at_least_one": True}
        return mask_tokens(tokens, is_word, self.text_mask_ratio, np.random.default_rng(seed), **options)

    def loss(self, model: Runner, batch: FusionBatch, step: Step) -> dict[str, Tensor]:
        masked = trimmed(batch.masked, batch.num_text)
        labels = batch.labels[:, : masked.shape[1]]
        options = {"label_smoothing": self.label_smoothing}
        total = model("learn_captions", batch.images, masked, batch.num_text, labels, **options)
        return {"loss": global_ratio(total, (labels >= 0).sum())}

    def speaks(self, assets: FusionAssets, model: Runner, device: torch.device, decoding: Decoding) -> Answerer:
        words = assets.wordpiece
        ids: Any = {"start_token_id": words.cls_token_id, "mask_token_id": words.mask_token_id}
        ids |= {"eos_token_id": words.sep_token_id, "max_length": self.max_text}

        def say(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
            pixels = assets.preprocess(images).to(device)
            return [words.decode(row) for row in model("say", pixels, **ids, **decoding.options()).tolist()]

        return say


@dataclass(frozen=True)
class Beit3Vqa(AnswersQuestions, OnBeit3):
    """Train BEiT-3 to answer questions about images by a classifier (arXiv 2208.10442), from a run of beit3."""

    run: RunConfig = field(default_factory=partial(RunConfig, epochs=10, batch_size=16))
    optim: OptimConfig = field(default_factory=partial(_tuned, lr=3e-5, weight_decay=0.01))
    head_lr_scale: float = 20.0
    """What the learning rate of the classifier and its pooler is multiplied by."""

    ends_in = "answers"

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(Rule(name, lr_scale=self.head_lr_scale) for name in ("answer_head.", "pool"))

    def assets(self, data: Any) -> FusionAssets:
        require(self.name, self.head_lr_scale > 0, "--head-lr-scale must be above 0, got {}", self.head_lr_scale)
        return super().assets(data)

    def loss(self, model: Runner, batch: AnswerBatch, step: Step) -> dict[str, Tensor]:
        logits = model("answer", batch.images, trimmed(batch.tokens, batch.num_text), batch.num_text)
        return {"loss": answer_loss(logits, batch.targets)}


_FLAGS = "--data digits --from {2} --max-text 16 --batch-size 64 --warmup 20 --ema 0.99 --lr 1e-3"
RETRIEVAL_PROOF = Proof(
    [*PRETRAINED, ("beit3-retrieval", f"{_FLAGS} --steps 300")],
    [Claim("zero-shot accuracy (held-out)", "zero-shot top-1", 0.85)],
)
CAPTION_PROOF = Proof(
    [*PRETRAINED, ("beit3-caption", f"{_FLAGS} --steps 300")],
    [Claim("captions that name their class (held-out)", "class named", 0.85)],
)
VQA_PROOF = Proof(
    [*PRETRAINED, ("beit3-vqa", f"{_FLAGS} --epochs 10 --head-lr-scale 2")],
    [Claim("VQA accuracy (held-out)", "VQA accuracy", 0.80)],
)
