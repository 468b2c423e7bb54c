"""BLIP-2's Q-Former: learned queries that read an image, beside a text, in one transformer (arXiv:2301.12597)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.nn import KeyValueCache, KeyValues, QFormerBlock
from mmcore.ops import masks, require


@dataclass(frozen=True)
class QFormerConfig:
    """Shape of the Q-Former; the defaults are BLIP-2's, for the states of ViT-g. `has_text` False leaves out the text's
    embeddings and MLPs, as stage 2 does. Every `cross_every`-th layer, the first among them, looks at the image."""

    num_queries: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    image_width: int = 1408
    cross_every: int = 2
    has_text: bool = True
    vocab_size: int = 30523
    max_text: int = 512
    pad_token_id: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        op = "QFormerConfig"
        for name in ("num_queries", "num_layers", "mlp_dim", "image_width", "cross_every", "vocab_size", "max_text"):
            value = getattr(self, name)
            require(op, value >= 1, "{} must be at least 1, got {}", name, value)
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            require(op, 0 <= value < 1, "{} must be from 0, below 1, got {}", name, value)
        divides = self.num_heads >= 1 and self.width % self.num_heads == 0
        require(op, divides, "num_heads must divide width {}, got {}", self.width, self.num_heads)
        is_id = 0 <= self.pad_token_id < self.vocab_size
        require(op, is_id, "pad_token_id must be in [0, {}), got {}", self.vocab_size, self.pad_token_id)


class TextEmbedding(nn.Module):
    """Tokens and their places, summed."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_text, config.width)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """int64 [B, T] and [T] to [B, T, D]."""
        return self.word(tokens) + self.position(places)


class QFormer(nn.Module):
    """A BERT whose first positions are learned queries, which read an image in every `cross_every`-th layer."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, config.width))
        self.text = TextEmbedding(config) if config.has_text else None
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            QFormerBlock(
                config.width,
                config.num_heads,
                config.mlp_dim,
                image_width=None if i % config.cross_every else config.image_width,
                has_text=config.has_text,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                norm_eps=config.norm_eps,
            )
            for i in range(config.num_layers)
        )
        self.init_weights()

    def forward(
        self,
        image: Tensor | Sequence[KeyValues] | None = None,
        tokens: Tensor | None = None,
        *,
        mask: masks.Mask | None = None,
        places: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """States of `[queries; text]`, of the queries where there are no tokens, of the text where there is no image.

        Args:
            image: [B, P, D_image], or `image_keys_values` of it; None = no queries.
            tokens: int64 [B, T].
            mask: among all positions, such as `mmkernels.masks.qformer_itc`, `_itm` or `_itg`.
            places: int64 [T], of the tokens in their text; None = from 0 on.
            caches: `new_caches()`, of what came before, to which these positions are added.

        Returns:
            [B, Q + T, D].
        """
        parts, num_queries = [], 0
        if image is not None:
            batch = image.shape[0] if isinstance(image, Tensor) else image[0].k.shape[0]
            parts.append(self.queries.expand(batch, -1, -1))
            num_queries = self.config.num_queries
        if tokens is not None:
            parts.append(self._embedded(tokens, places))
        require("QFormer", len(parts) > 0, "image or tokens must be given, got {}", "neither")
        x = self.dropout(self.norm(torch.cat(parts, 1)))
        each = zip(self.blocks, self._per_block(image), caches or [None] * len(self.blocks), strict=True)
        for block, keys_values, cache in each:
            x = block(x, keys_values, num_queries=num_queries, mask=mask, cache=cache)
        return x

    def image_keys_values(self, image: Tensor) -> list[KeyValues]:
        """Those of [B, P, D_image] in each layer that looks at it, for as many passes as read them."""
        blocks: Any = self.blocks
        return [block.cross.keys_values(image) for block in blocks if block.cross is not None]

    def new_caches(self) -> list[KeyValueCache]:
        """Empty ones, one a layer."""
        return [KeyValueCache() for _ in self.blocks]

    def _per_block(self, image: Tensor | Sequence[KeyValues] | None) -> list[Tensor | KeyValues | None]:
        if image is None or isinstance(image, Tensor):
            return [image] * len(self.blocks)
        given = iter(image)
        return [None if block.cross is None else next(given) for block in self.blocks]

    def _embedded(self, tokens: Tensor, places: Tensor | None) -> Tensor:
        op = "QFormer"
        require(op, self.text is not None, "tokens must be None without has_text, got {}", list(tokens.shape))
        assert self.text is not None
        fits = tokens.ndim == 2 and tokens.dtype == torch.int64
        require(op, fits, "tokens must be int64 [B, T], got {} {}", tokens.dtype, list(tokens.shape))
        if places is None:
            most, length = self.config.max_text, tokens.shape[1]
            require(op, length <= most, "tokens must be at most {} a row, got {}", most, length)
            places = torch.arange(length, device=tokens.device)
        return self.text(tokens, places)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers keep the size of what they are given, biases are 0; embeddings as BERT's."""
        nn.init.normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if self.text is not None:
            self.text.word.weight[self.config.pad_token_id] = 0
