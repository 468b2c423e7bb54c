"""DeCLIP: CLIP with SimSiam's heads on images and masked words in captions (arXiv 2110.05208)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.labels import IGNORED
from mmcore.nn import Linear
from mmcore.ops import linear_cross_entropy
from mmcore.parts.heads import projection_head
from mmcore.systems.clip.model import CLIP, TextTower, TowersConfig, eos_positions, unit_norm

MASKED = -1
"""What stands for a masked token among tokens."""


class DeclipBatch(NamedTuple):
    """Two views of images, uint8 [B, 3, S, S], captions with words masked and changed ones, int64 [B, T], and what was
    masked, -100 elsewhere."""

    images: Tensor
    second: Tensor
    tokens: Tensor
    changed: Tensor
    labels: Tensor


class MaskedText(TextTower):
    """CLIP's text tower, which also gives the states of all tokens, some of them `MASKED`."""

    def __init__(self, config: Any, embed_dim: int) -> None:
        super().__init__(config, embed_dim)
        self.mask_embedding = nn.Parameter(torch.randn(config.width) * 0.02)

    def forward(self, tokens: Tensor, lengths: Sequence[int] | None = None, *, with_words: bool = False) -> Any:
        """[B, T] to [B, E]; `with_words`, besides the normed states [B, T, D]."""
        if not with_words:
            return super().forward(tokens, lengths)
        self.check("DeCLIP", tokens)
        words = self.token_embedding(tokens.clamp(min=0))
        words = torch.where((tokens == MASKED)[:, :, None], self.mask_embedding.to(words.dtype), words)
        states = self.norm_final(self.transformer(words + self.position_embedding[: tokens.shape[1]]))
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.proj(states[rows, eos_positions(tokens, self.eos_token_id)]), states


class WordHead(Linear):
    """States [B, T, D] to words, as the cross-entropy with labels [B, T], 0 where none is masked."""

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        options = {"bias": self.bias, "ignore_index": IGNORED, "reduction": "none"}
        return linear_cross_entropy(states.flatten(0, 1), self.weight, labels.flatten(), **options).view(labels.shape)


class DeCLIP(CLIP):
    """CLIP with `projector` and `predictor` on image embeddings and `words` on the states of captions."""

    def __init__(self, config: TowersConfig, width: int, narrow: int) -> None:
        super().__init__(config)
        self.text = MaskedText(config.text, config.embed_dim)
        self.projector = projection_head((config.embed_dim, width, width, width), ends_normalised=True)
        self.predictor = projection_head((width, narrow, width))
        self.words = WordHead(config.text.width, config.text.vocab_size)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Tensor | None,
        tokens: Tensor | None = None,
        *more: Any,
        only_projection: bool = False,
        **options: Any,
    ) -> Any:
        """As `CLIP.forward`. Of the five tensors of a `DeclipBatch`: unit-norm embeddings of both views, of masked and
        of changed captions; a row's loss of SimSiam, of its masked words and their number, [B, 1] each; the logit
        scale. `only_projection`: of images, what `projector` makes of them."""
        if only_projection:
            assert images is not None
            return self.projector(self.embed_image(images))
        if len(more) != 3:
            return super().forward(images, tokens, *more, **options)
        return self._views(DeclipBatch(*(images, tokens, *more)))  # pyright: ignore[reportArgumentType]

    def _views(self, batch: DeclipBatch) -> tuple[Tensor, ...]:
        views = [self.embed_image(x) for x in (batch.images, batch.second)]
        projected = [self.projector(x) for x in views]
        predicted = [self.predictor(x) for x in projected]
        cosines = [F.cosine_similarity(predicted[i].float(), projected[1 - i].float().detach()) for i in (0, 1)]
        siamese = -(cosines[0] + cosines[1])[:, None] / 2
        text, states = self.text(batch.tokens, with_words=True)
        masked = self.words(states, batch.labels).sum(1, keepdim=True)
        count = (batch.labels != IGNORED).sum(1, keepdim=True).to(masked.dtype)
        units = [unit_norm(x) for x in (*views, text, self.text(batch.changed, with_words=True)[0])]
        return *units, siamese, masked, count, self.scale()
