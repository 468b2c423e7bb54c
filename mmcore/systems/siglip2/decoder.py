"""A decoder that captions images of any shape, word by word or all words at once (LocCa, arXiv 2403.19596; CapPa,
arXiv 2306.07915)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.labels import IGNORED
from mmcore.nn import MLP, Attention, CrossAttention, KeyValueCache, Linear, Packing
from mmcore.ops import linear_cross_entropy, masks
from mmcore.parts.text import TextConfig


class DecoderBlock(nn.Module):
    """x + attention(LN(x)), then x + attention(LN(x), image), then x + MLP(LN(x))."""

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=config.norm_eps) for _ in range(3))
        self.attn = Attention(width, config.num_heads)
        self.cross = CrossAttention(width, config.num_heads, key_width=image_width)
        self.mlp = MLP(width, config.mlp_dim, activation=config.activation)

    def forward(
        self, x: Tensor, image: Any, mask: masks.Mask | None, seen: masks.Mask, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Tokens [1, M, D], or with a cache one of each row, [R, 1, D]; `seen` of the states of all images is for them
        as one row."""
        x = x + self.attn(self.norm1(x), mask, cache)
        read = self.cross(self.norm2(x).view(1, -1, x.shape[2]), image, seen)
        x = x + read.view_as(x)
        return x + self.mlp(self.norm3(x))


class CaptionHead(Linear):
    """States to words: as cross-entropies with labels, or as logits."""

    def forward(self, states: Tensor, labels: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[M, D] to logits [M, V], or with labels [M] to [M], 0 where they are -100."""
        if labels is None:
            return super().forward(states)
        return linear_cross_entropy(states, self.weight, labels, bias=self.bias, ignore_index=IGNORED, reduction="none")


class Decoder(nn.Module):
    """Captions of images; it has half the layers of the text tower, whose other sizes it shares."""

    def __init__(self, config: TextConfig, image_width: int, num_layers: int) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.vocab_size, width = config.vocab_size, config.width
        self.token_embedding = nn.Embedding(config.vocab_size + 2, width)  # the last two begin, and mask
        self.position_embedding = nn.Embedding(config.context_length, width)
        self.blocks = nn.ModuleList(DecoderBlock(config, image_width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = CaptionHead(width, config.vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        nn.init.zeros_(self.head.weight)

    @property
    def start(self) -> int:
        """The token that every caption begins with."""
        return self.vocab_size

    def forward(
        self, states: Tensor, images: Packing, tokens: Tensor, lengths: Sequence[int], parallel: Sequence[bool]
    ) -> Tensor:
        """Of each caption the mean cross-entropy of its tokens, [B, 1], at least float32.

        Args:
            states: of all images, [1, N, D_image].
            images: where the states of each are.
            tokens: int64 [B, T].
            lengths: how many tokens of each caption are learned.
            parallel: captions all of whose tokens are predicted from masks at once, which see each other, T of each;
                in the others a token sees those before it.
        """
        total = tokens.shape[1]
        counts = [total if is_masked else n for n, is_masked in zip(lengths, parallel, strict=True)]
        packing, device = Packing.of(counts, tokens.device, is_causal=False), tokens.device
        each = np.repeat(np.array([parallel, lengths], dtype=np.int64), counts, axis=1)
        is_masked, length = torch.tensor(each).to(device, non_blocking=True)
        place = packing.places % packing.length
        before = F.pad(tokens, (1, 0), value=self.start)[:, : packing.length]
        read = torch.where(is_masked > 0, self.start + 1, packing.pack(before)[0])
        last = torch.arange(1, len(place) + 1, device=device, dtype=torch.int32)
        mask = replace(packing.mask, hi=torch.where(is_masked > 0, packing.mask.hi, last))
        x = (self.token_embedding(read) + self.position_embedding(place))[None]
        seen = images.seen_by(counts)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = x, states, mask, seen
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        labels = torch.where(place < length, packing.pack(tokens[:, : packing.length])[0], IGNORED)
        losses = self.head(self.norm(x)[0], labels)
        wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
        padded = wide.new_zeros(len(counts) * packing.length).index_copy(0, packing.places, wide)
        share = torch.tensor(lengths).to(device, non_blocking=True).to(wide.dtype)
        return padded.view(len(counts), -1).sum(1, keepdim=True) / share[:, None]

    def keys_values(self, states: Tensor) -> list[Any]:
        """Those of the images' states in each layer, for as many tokens as read them."""
        return [block.cross.keys_values(states) for block in self.blocks]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def following(
        self, tokens: Tensor, place: int, images: list[Any], seen: masks.Mask, caches: Sequence[KeyValueCache]
    ) -> Tensor:
        """Logits [R, V] of what comes behind tokens [R], which are at a place of their captions; `images` of
        `keys_values`, `seen` as one row of R."""
        x = (self.token_embedding(tokens) + self.position_embedding(torch.full_like(tokens, place)))[:, None]
        for block, keys_values, cache in zip(self.blocks, images, caches, strict=True):
            x = block(x, keys_values, None, seen, cache)
        return self.head(self.norm(x)[:, 0])
