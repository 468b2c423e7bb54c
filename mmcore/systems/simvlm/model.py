"""SimVLM: words behind a prefix of image and text, by an encoder and a decoder or by one stack (arXiv 2108.10904)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.data import normalized
from mmcore.labels import IGNORED
from mmcore.nn import MLP, Attention, CrossAttention, KeyValueCache, KeyValues, Transformer
from mmcore.ops import linear_cross_entropy, masks, require
from mmcore.parts.decoding import generate
from mmcore.parts.text import TextConfig
from mmcore.parts.vit import VisionConfig

STRIDES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (4, 2, 2), 32: (4, 4, 2)}
"""Of the stem's convolutions, by the pixels that a state of an image is of."""


@dataclass(frozen=True)
class SimVLMConfig:
    """Shape of the model: of `vision` the images, the pixels of a state, and the encoder, or the one stack, that reads
    image and text; of `text` the words, the most of a text and the decoder.

    Args:
        has_decoder: an encoder of the prefix and a decoder of the rest; False = one stack, whose prefix sees itself
            and whose rest is causal, with the layers of `vision` alone.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    has_decoder: bool = True

    def __post_init__(self) -> None:
        op, width, patch = "SimVLMConfig", self.vision.width, self.vision.patch_size
        require(op, self.text.width == width, "text.width must be that of vision, {}, got {}", width, self.text.width)
        require(op, patch in STRIDES, "vision.patch_size must be one of {}, got {}", [*STRIDES], patch)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """Three convolutions, norms and GELU between them: images [B, 3, S, S] to [B, P, D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config, widths = config, (3, config.width // 4, config.width // 2, config.width)
        layers: list[nn.Module] = []
        for i, stride in enumerate(STRIDES[config.patch_size]):
            layers += [ChannelNorm(widths[i], eps=config.norm_eps), nn.GELU()] if i else []
            size = 2 * stride - 1 if stride > 1 else 1
            layers.append(nn.Conv2d(widths[i], widths[i + 1], size, stride=stride, padding=size // 2))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        fits = images.ndim == 4 and images.shape[1:] == (3, size, size)
        require("SimVLM", fits, "images must be [B, 3, {}, {}], got {}", size, size, list(images.shape))
        if images.dtype == torch.uint8:
            images = normalized(images, self.config.image_mean, self.config.image_std)
        first: Any = self.layers[0]
        return self.layers(images.to(first.weight.dtype)).flatten(2).transpose(1, 2)


class DecoderBlock(nn.Module):
    """x + attention(LN(x)), causal, then x + attention(LN(x), prefix), then x + MLP(LN(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.norm1, self.norm_cross, self.norm2 = (nn.LayerNorm(width, eps=config.norm_eps) for _ in range(3))
        self.attn = Attention(width, heads, is_causal=True)
        self.cross = CrossAttention(width, heads)
        self.mlp = MLP(width, config.mlp_dim, activation=config.activation)
        shrunk = (3 * config.num_layers * width) ** -0.5
        stds = {self.attn.qkv: width**-0.5, self.cross.q: width**-0.5, self.cross.kv: width**-0.5}
        stds |= dict.fromkeys((self.attn.out, self.cross.out, self.mlp.fc2), shrunk)
        for layer, std in (stds | {self.mlp.fc1: (2 * width) ** -0.5}).items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, prefix: Tensor | KeyValues, mask: masks.Mask | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[B, T, D] beside [B, L, D], or `cross.keys_values` of it; `mask` for T queries and L keys."""
        x = x + self.attn(self.norm1(x), cache=cache)
        x = x + self.cross(self.norm_cross(x), prefix, mask)
        return x + self.mlp(self.norm2(x))


class WordHead(nn.Module):
    """Normed states to words, by the words' embedding."""

    def __init__(self, embedding: nn.Embedding, *, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embedding.weight.shape[1], eps=norm_eps)
        self.weight = embedding.weight  # the same parameter, which ZeRO-3 gathers for either

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """[..., D] to logits [..., V]; with labels [...], -100 where there is none, to the sum of the
        cross-entropies."""
        x = self.norm(x)
        if labels is None:
            return F.linear(x, self.weight)
        return linear_cross_entropy(x.flatten(0, -2), self.weight, labels.flatten(), reduction="sum")


class SimVLM(nn.Module):
    """Words behind a prefix. Texts are int64 [B, T], the first token their start; `num_prefix` [B], at least 1, of them
    belong to the prefix, which has the image before them, and `num_text` [B] are no padding."""

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        vision, text, width = config.vision, config.text, config.text.width
        self.stem = Stem(vision)
        self.image_position = nn.Parameter(torch.randn(vision.num_patches, width) * 0.02)
        self.token_embedding = nn.Embedding(text.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.randn(text.context_length, width) * 0.02)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        options: dict[str, Any] = {"activation": vision.activation, "norm_eps": vision.norm_eps}
        sizes = vision.num_layers, vision.num_heads, vision.mlp_dim
        self.transformer = Transformer(width, *sizes, is_causal=False, **options)
        num_layers = text.num_layers if config.has_decoder else 0
        self.norm_prefix = nn.LayerNorm(width, eps=vision.norm_eps) if config.has_decoder else None
        self.decoder = nn.ModuleList(DecoderBlock(text) for _ in range(num_layers))
        self.head = WordHead(self.token_embedding, norm_eps=text.norm_eps)

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """`loss`, `logits` or `generate` by name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    def loss(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the words behind the prefix, summed, and how many they are; inputs as of `states`."""
        states, labels = self.states(*inputs)
        return self.head(states, labels), (labels != IGNORED).sum()

    def logits(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] and what they are to predict, [B, S], -100 where that is nothing."""
        states, labels = self.states(*inputs)
        return self.head(states), labels

    def states(
        self, images: Tensor | None, tokens: Tensor, num_text: Tensor, num_prefix: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """States that predict the words behind the prefix, [B, S, D], and these words, -100 where there is none.

        Args:
            images: [B, 3, S, S]; None = texts alone.
            tokens, num_text, num_prefix: see the class.
            sizes: the longest prefix, and the longest rest, known on the host: an encoder and a decoder compute these.
        """
        op, most = "SimVLM", self.config.text.context_length
        fits = tokens.ndim == 2 and 2 <= tokens.shape[1] <= most
        require(op, fits, "tokens must be [B, T] with 2 <= T <= {}, got {}", most, list(tokens.shape))
        if self.norm_prefix is None:
            places = torch.arange(1, tokens.shape[1], device=tokens.device)
            x, num_image = self._embedded(images, tokens[:, :-1])
            prefix = (num_prefix + num_image).clamp(max=x.shape[1])  # of a text of which nothing is learned
            x = self.transformer(x, mask=masks.prefix_causal(prefix, x.shape[1]))
            is_learned = (places >= num_prefix[:, None]) & (places < num_text[:, None])
            return x[:, num_image:], tokens[:, 1:].masked_fill(~is_learned, IGNORED)
        prefix, seen = self.encode(images, tokens[:, : sizes[0]], num_prefix)
        places = num_prefix[:, None] - 1 + torch.arange(sizes[1] + 1, device=tokens.device)
        texts = tokens.gather(1, places.clamp(max=tokens.shape[1] - 1))
        labels = texts.masked_fill(places >= num_text[:, None], IGNORED)[:, 1:]
        x = self._words(texts[:, :-1], places[:, :-1].clamp(max=most - 1))
        mask, recompute = masks.key_padding(seen, x.shape[1]), self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.decoder:
            inputs = x, prefix, mask
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return x, labels

    def encode(self, images: Tensor | None, tokens: Tensor, num_prefix: Tensor) -> tuple[Tensor, Tensor]:
        """The normed states of the prefix, [B, P + T, D], and which of them are there, bool [B, P + T]."""
        assert self.norm_prefix is not None
        x, num_image = self._embedded(images, tokens)
        seen = _seen(num_image, tokens, num_prefix)
        return self.norm_prefix(self.transformer(x, mask=masks.key_padding(seen, x.shape[1]))), seen

    def _words(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self.token_embedding(tokens) + F.embedding(places, self.position_embedding)

    def _embedded(self, images: Tensor | None, tokens: Tensor) -> tuple[Tensor, int]:
        """Image and text, one behind the other, and how many states are the image's."""
        words = self._words(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        if images is None:
            return words, 0
        require("SimVLM", len(images) == len(tokens), "tokens must be {} texts, got {}", len(images), len(tokens))
        x = self.stem(images) + self.image_position
        return torch.cat([x, words.to(x.dtype)], 1), x.shape[1]

    @torch.no_grad()
    def generate(
        self, images: Tensor | None, tokens: Tensor, num_prefix: Tensor, *, max_length: int, **options: Any
    ) -> Tensor:
        """Texts that go on behind a prefix, int64 [B, T].

        Args:
            images: [B, 3, S, S]; None = texts alone.
            tokens: int64 [B, T], of which `num_prefix` [B], at least 1, are the prefix's.
            max_length: most tokens of a text; with T no more than the context.
            options: how tokens are chosen and what ends a text, see `mmcore.parts.decoding.generate`.
        """
        op, left = "SimVLM.generate", self.config.text.context_length - tokens.shape[1]
        require(op, 1 <= max_length <= left, "max_length must be in [1, {}], got {}", left, max_length)
        start = tokens.gather(1, num_prefix[:, None] - 1)[:, 0]
        going = _Stack(self, images, tokens, num_prefix) if self.norm_prefix is None else None
        step = going or _EncoderDecoder(self, images, tokens, num_prefix)
        return generate(op, step, start, max_length=max_length, **options)


def _seen(num_image: int, tokens: Tensor, num_prefix: Tensor) -> Tensor:
    """Which of image and prefix are there, bool [B, P + T]."""
    places = torch.arange(-num_image, tokens.shape[1], device=tokens.device)
    return places < num_prefix[:, None]


class _Going:
    """A text that goes on: what it is called with is a `Step` of `mmcore.parts.decoding`."""

    def __init__(self, model: SimVLM, seen: Tensor, num_prefix: Tensor) -> None:
        self.model, self.seen, self.num_prefix, self.steps = model, seen, num_prefix, count()
        self.image: list[KeyValueCache] = []  # of what stays as it is
        self.text: list[KeyValueCache] = []

    def select(self, rows: Tensor | None) -> None:
        if rows is None:
            return
        for cache in self.text:
            cache.select(rows)
        if len(self.seen) != len(rows):  # the first time: a row then stays with its image
            self.seen, self.num_prefix = self.seen[rows], self.num_prefix[rows]
            for cache in self.image:
                cache.select(rows)

    def words(self, tokens: Tensor, place: int) -> Tensor:
        """Of [R] at `place` behind the prefix, [R, 1, D]."""
        return self.model._words(tokens[:, None], self.num_prefix[:, None] + place)


class _EncoderDecoder(_Going):
    def __init__(self, model: SimVLM, images: Tensor | None, tokens: Tensor, num_prefix: Tensor) -> None:
        prefix, seen = model.encode(images, tokens, num_prefix)
        super().__init__(model, seen, num_prefix)
        blocks: Any = model.decoder
        self.image, self.text = ([KeyValueCache() for _ in blocks] for _ in range(2))
        for block, cache in zip(blocks, self.image, strict=True):
            cache.held = block.cross.keys_values(prefix)

    def __call__(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        self.select(rows)
        x, mask = self.words(tokens, next(self.steps) - 1), masks.key_padding(self.seen, 1)
        for block, image, text in zip(self.model.decoder, self.image, self.text, strict=True):
            x = block(x, image.held, mask, text)
        return self.model.head(x[:, 0])


class _Stack(_Going):
    def __init__(self, model: SimVLM, images: Tensor | None, tokens: Tensor, num_prefix: Tensor) -> None:
        x, num_image = model._embedded(images, tokens)
        super().__init__(model, _seen(num_image, tokens, num_prefix), num_prefix)
        self.text = [KeyValueCache() for _ in model.transformer.blocks]
        x = model.transformer(x, mask=masks.key_padding(self.seen, x.shape[1]), caches=self.text)
        rows = torch.arange(len(x), device=x.device)
        self.first = model.head(x[rows, num_image + num_prefix - 1])

    def __call__(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        self.select(rows)
        number = next(self.steps)
        if number == 0:  # the prefix sees its last token, so that it was there from the start
            return self.first if rows is None else self.first[rows]
        behind = torch.ones(len(tokens), number, dtype=torch.bool, device=tokens.device)
        mask = masks.key_padding(torch.cat([self.seen, behind], 1), 1)
        x = self.model.transformer(self.words(tokens, number - 1), mask=mask, caches=self.text)
        return self.model.head(x[:, 0])
