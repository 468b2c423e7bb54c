"""CoCa: CLIP's towers, and a decoder that goes on from the text tower and reads the image (arXiv 2205.01917), as
open_clip has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.labels import IGNORED
from mmcore.nn import MLP, AttentionalPooler, Block, CrossAttention, KeyValueCache, KeyValues, Linear
from mmcore.ops import linear_cross_entropy, masks, require
from mmcore.parts.decoding import generate
from mmcore.parts.foreign import projection
from mmcore.parts.image_tower import PooledTower
from mmcore.parts.vit import Tower, ViT, check_tower
from mmcore.systems.clip.model import CLIP, CLIPConfig, TextTower, check_lengths, eos_positions, unit_norm

PAD = 0
"""What captions are padded with; in CLIP's vocabulary it is also a "!" that more signs follow."""


@dataclass(frozen=True)
class CoCaConfig(CLIPConfig):
    """CLIP's towers of one width `embed_dim` of the text and of what is read of an image, and the decoder.

    Args:
        num_layers: of the decoder, each a self-attention and a cross-attention, with a feed-forward behind either.
        num_queries: of the attentional pooler: the first is the image's embedding, the decoder reads the others.
        correct_cls_mask: the caption's class token sees the caption and itself; False = as open_clip trained its
            models, one place more of the padding, and itself only behind a caption without padding.
        pads_by_id: tokens of id 0 are padding wherever they stand, as open_clip has it; False = what is behind the end
            token is.
    """

    num_layers: int = 12
    num_heads: int = 8
    num_queries: int = 256
    num_pool_heads: int = 8
    correct_cls_mask: bool = False
    pads_by_id: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        op, width = "CoCaConfig", self.text.width
        require(
            op, self.embed_dim == width, "embed_dim must be the text tower's width {}, got {}", width, self.embed_dim
        )
        check_tower(op, width, self.num_heads, self.text.activation, num_layers=self.num_layers)
        require(op, self.num_queries >= 2, "num_queries must be at least 2, got {}", self.num_queries)
        divides = self.num_pool_heads >= 1 and width % self.num_pool_heads == 0
        require(op, divides, "num_pool_heads must divide {}, got {}", width, self.num_pool_heads)


class PooledImage(ViT):
    """A ViT that learned queries read: images to the normed states of the queries, [B, Q, E]; `proj` is the first's."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__(config.vision)
        heads, width = config.num_pool_heads, config.embed_dim
        self.pooler = AttentionalPooler(width, config.num_queries, heads, key_width=config.vision.width)
        self.norm_pool = nn.LayerNorm(width)
        self.proj = projection(width, width)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.norm_pool(self.pooler(super().forward(images, kept)))

    def features(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] to what the first query reads, [B, E]."""
        return self(images, kept)[:, 0]


class CaptionTower(TextTower):
    """CLIP's text tower with a class token at the end of the context, in place of the caption's end token."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__(config.text, config.embed_dim)
        self.is_correct, self.pads_by_id = config.correct_cls_mask, config.pads_by_id
        length, width = config.text.context_length + 1, config.text.width
        self.position_embedding = nn.Parameter(torch.randn(length, width) * 0.01)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.01)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        with_states: bool = False,
        caches: Sequence[KeyValueCache] | None = None,
        first_place: int = 0,
    ) -> Any:
        """[B, T] to embeddings [B, E], not yet normalised; `with_states`, besides the states of the tokens, [B, L, D],
        where L is one more than the longest caption, or all of the context. For `lengths` see `CLIP.encode_text`.

        With `caches`, of what came before, to the states of these tokens alone, [B, T, D], the first of which stands at
        `first_place`.
        """
        if caches is not None:
            positions = self.position_embedding[first_place : first_place + tokens.shape[1]]
            return self.transformer(self.token_embedding(tokens) + positions, caches=caches)
        self.check("CoCa", tokens)
        ends = eos_positions(tokens, self.eos_token_id)
        if lengths is not None:
            check_lengths(tokens, ends, lengths)
        num_text = ends + 1
        if lengths is None and tokens.is_cpu and not torch.compiler.is_compiling():
            lengths = num_text.tolist()
        length = self.context_length if lengths is None else min(self.context_length, max(lengths, default=0) + 1)
        tokens = F.pad(tokens, (0, max(0, length - tokens.shape[1])), value=PAD)[:, :length]
        x = torch.cat([self.token_embedding(tokens), self.class_embedding.expand(len(tokens), 1, -1)], 1)
        places = torch.cat([self.position_embedding[:length], self.position_embedding[self.context_length :]])
        mask = self._mask(tokens, num_text)
        if not with_states:
            x = self.transformer(x + places, pool=lambda x: x[:, -1], mask=mask)
            return self.proj(self.norm_final(x))
        x = self.transformer(x + places, mask=mask)
        return self.proj(self.norm_final(x[:, -1])), x[:, :-1]

    def counted(self, tokens: Tensor) -> Tensor:
        """Which tokens are no padding, bool [B, T]."""
        if self.pads_by_id:
            return tokens != PAD
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return places <= eos_positions(tokens, self.eos_token_id)[:, None]

    def _mask(self, tokens: Tensor, num_text: Tensor) -> masks.Intervals:
        size = tokens.shape[1] + 1
        if not (self.is_correct or self.pads_by_id):
            return masks.lengths((num_text + 1).clamp(max=size), size, size)
        counted, itself = self.counted(tokens), torch.ones_like(tokens[:, :1], dtype=torch.bool)
        return masks.key_padding(torch.cat([counted, itself] if self.is_correct else [itself, counted], 1), size)


class CrossBlock(nn.Module):
    """x + attention(LN(x), LN(image)), then x + MLP(LN(x))."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.norm_image = nn.LayerNorm(width, eps=norm_eps)
        self.attn = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation=activation)

    def keys_values(self, image: Tensor) -> KeyValues:
        """Of [B, Q, D], for as many calls as read them."""
        return self.attn.keys_values(self.norm_image(image))

    def forward(self, x: Tensor, image: Tensor | KeyValues) -> Tensor:
        """[B, T, D] beside [B, Q, D], or `keys_values` of it."""
        seen = self.keys_values(image) if isinstance(image, Tensor) else image
        x = x + self.attn(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """A causal block of text, then one that reads the image."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, activation: str, norm_eps: float) -> None:
        super().__init__()
        options: dict[str, Any] = {"activation": activation, "norm_eps": norm_eps}
        self.text = Block(width, num_heads, mlp_dim, is_causal=True, **options)
        self.cross = CrossBlock(width, num_heads, mlp_dim, **options)

    def forward(self, x: Tensor, image: Tensor | KeyValues, cache: KeyValueCache | None = None) -> Tensor:
        return self.cross(self.text(x, cache=cache), image)


class CaptionHead(Linear):
    """States to words."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, T, D] to logits [B, T, V]; with labels [B, T], -100 where there is none, to the sum of the
        cross-entropies."""
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x.flatten(0, 1), self.weight, labels.flatten(), reduction="sum")


class CaptionDecoder(nn.Module):
    """States of a caption and of an image to the next words."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        self.activation_checkpointing = False
        text, width = config.text, config.text.width
        options = {"activation": text.activation, "norm_eps": text.norm_eps}
        # open_clip has four times the width, whatever a configuration says
        sizes = width, config.num_heads, 4 * width
        self.blocks = nn.ModuleList(DecoderBlock(*sizes, **options) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(width, eps=text.norm_eps)
        self.head = CaptionHead(width, text.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        blocks: Any = self.blocks
        for block in blocks:
            block.text.init_weights(2 * config.num_layers)
            attn, shrunk = block.cross.attn, (4 * config.num_layers * width) ** -0.5
            stds = {attn.q: width**-0.5, attn.kv: width**-0.5, attn.out: shrunk}
            stds |= {block.cross.mlp.fc1: (2 * width) ** -0.5, block.cross.mlp.fc2: shrunk}
            for layer, std in stds.items():
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        image: Tensor | Sequence[KeyValueCache],
        labels: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of what follows each token, or with labels [B, T] the sum of their cross-entropies.

        Args:
            x: [B, T, D], states of tokens.
            image: [B, Q, D], or `image_caches` of it.
            labels: int64 [B, T], -100 where there is none.
            caches: of the tokens before these.
        """
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            seen = image if isinstance(image, Tensor) else image[i].held
            inputs = x, seen, None if caches is None else caches[i]
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.head(self.norm_final(x), labels)

    def image_caches(self, image: Tensor) -> list[KeyValueCache]:
        """What each layer reads of [B, Q, D]."""
        blocks: Any = self.blocks
        caches = [KeyValueCache() for _ in blocks]
        for block, cache in zip(blocks, caches, strict=True):
            cache.held = block.cross.keys_values(image)
        return caches


class CoCa(CLIP):
    """CLIP whose image tower is read by queries, whose captions have a class token, and with a `decoder`."""

    config: CoCaConfig

    def __init__(self, config: CoCaConfig) -> None:
        nn.Module.__init__(self)
        self.config, self.locked = config, ()
        self.visual, self.text, self.decoder = PooledImage(config), CaptionTower(config), CaptionDecoder(config)
        self.add_logit_scale()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Tensor | None,
        tokens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        *,
        generate: Mapping[str, Any] | None = None,
    ) -> Any:
        """As `CLIP.forward` of images or of captions alone. Of both: unit-norm embeddings [B, E] of either; the
        cross-entropy of the captions, summed, a B-th of it in each of [B, 1], and how many tokens that is of, likewise;
        the logit scale. With `generate`, `CoCa.generate` and its options."""
        if generate is not None:
            assert images is not None
            return self.generate(images, **generate)
        if images is None or tokens is None:
            return super().forward(images, tokens, lengths)
        require("CoCa", len(images) == len(tokens), "tokens must be of {} captions, got {}", len(images), len(tokens))
        image = self.visual(images)
        text, states = self.text(tokens, lengths, with_states=True)
        labels = tokens[:, 1 : states.shape[1]]
        labels = labels.masked_fill(~self.text.counted(tokens)[:, 1 : states.shape[1]], IGNORED)
        total = self.decoder(states[:, : labels.shape[1]], image[:, 1:], labels)
        found = [(x / len(tokens)).expand(len(tokens), 1) for x in (total, (labels != IGNORED).sum().to(total.dtype))]
        return unit_norm(self.visual.proj(image[:, 0])), unit_norm(text), *found, self.scale()

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Of what follows each token of captions [B, T], [B, L - 1, V]; see `CaptionTower` for L."""
        _, states = self.text(tokens, with_states=True)
        return self.decoder(states[:, :-1], self.visual(images)[:, 1:])

    @torch.no_grad()
    def generate(
        self, images: Tensor, prompt: Tensor, *, eos_token_id: int, max_length: int | None = None, **options: Any
    ) -> Tensor:
        """Captions of [B, 3, S, S], int64 [B, T], padded with 0 behind the end token.

        Args:
            images: [B, 3, S, S].
            prompt: int64 [P], what all of them begin with, the start token first; it is not returned.
            eos_token_id: what ends a caption.
            max_length: most tokens of a caption behind its prompt; None = what is left of the context.
            options: how tokens are chosen, see `mmcore.parts.decoding.generate`.
        """
        op, left = "CoCa.generate", self.text.context_length - prompt.numel()
        fits = prompt.ndim == 1 and prompt.numel() >= 1 and left >= 1
        require(op, fits, "prompt must be [P] with 1 <= P < {}, got {}", self.text.context_length, list(prompt.shape))
        max_length = left if max_length is None else max_length
        require(op, 1 <= max_length <= left, "max_length must be in [1, {}], got {}", left, max_length)
        seen = self.decoder.image_caches(self.visual(images)[:, 1:])
        text, decoder = ([KeyValueCache() for _ in range(n)] for n in (len(self.text.transformer.blocks), len(seen)))
        tokens, places = prompt.expand(len(images), -1), count(prompt.numel() - 1)
        if prompt.numel() > 1:
            self.decoder(self.text(tokens[:, :-1], caches=text), seen, caches=decoder)

        def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if rows is not None:
                for cache in (*text, *decoder):
                    cache.select(rows)
                if seen[0].held is not None and len(seen[0].held.k) != len(rows):  # afterwards a row's image stays
                    for cache in seen:
                        cache.select(rows)
            states = self.text(tokens[:, None], caches=text, first_place=next(places))
            return self.decoder(states, seen, caches=decoder)[:, 0]

        ends = {"max_length": max_length, "eos_token_id": eos_token_id, "pad_token_id": PAD}
        return generate(op, step, tokens[:, -1], **ends, **options)

    def image_tower(self) -> Tower:
        """The ViT, whole, and the norm behind it that the pooler reads it through."""
        config = replace(self.config.vision, has_final_norm=True)
        state = {
            n: x for n, x in self.visual.state_dict().items() if not n.startswith(("pooler.", "norm_pool.", "proj."))
        }
        norm = {f"norm_post.{n}": x for n, x in self.visual.pooler.key_norm.state_dict().items()}
        return Tower(config, state | norm)

    def pooled_tower(self) -> PooledTower:
        """The same, read as the mean of its patches."""
        tower = self.image_tower()
        return PooledTower(tower.config, "mean", tower.state)

    def set_activation_checkpointing(self, enable: bool) -> None:
        super().set_activation_checkpointing(enable)
        self.decoder.activation_checkpointing = enable
