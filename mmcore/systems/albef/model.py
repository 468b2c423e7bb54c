"""ALBEF: an image tower, and BERT whose upper half reads images too (arXiv 2107.07651)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn import KeyValues, Linear
from mmcore.ops import masks, require
from mmcore.parts.bert import BertConfig, BertEncoder
from mmcore.parts.text_head import TextHead
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.systems.albef.align import Pairs


@dataclass(frozen=True)
class ALBEFConfig:
    """Both towers, of which the text's reads images from `text.first_cross` on, the width of the space where they meet,
    and the first temperature, a divisor."""

    vision: VisionConfig
    text: BertConfig
    embed_dim: int = 256
    init_temperature: float = 0.07

    def __post_init__(self) -> None:
        op, sizes = "ALBEFConfig", (self.vision.width, self.text.image_width)
        require(op, self.embed_dim >= 1, "embed_dim must be at least 1, got {}", self.embed_dim)
        require(op, sizes[0] == sizes[1], "text.image_width must be vision.width {}, got {}", *sizes)
        has_both = self.text.first_cross >= 1
        require(op, has_both, "text.first_cross must be at least 1, got {}", self.text.first_cross)


def unit_norm(x: Tensor) -> Tensor:
    """Rows of norm 1, float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def first(x: Tensor) -> Tensor:
    """[B, T, D] to [B, 1, D]: the state of [CLS]."""
    return x[:, :1]


class ALBEF(nn.Module):
    """`visual`, `text`, the heads of contrast, matching and masked words."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ViT(config.vision)
        self.text = BertEncoder(config.text)
        self.text_head = TextHead(self.text.word_embedding, norm_eps=config.text.norm_eps)
        self.vision_proj = Linear(config.vision.width, config.embed_dim)
        self.text_proj = Linear(config.text.width, config.embed_dim)
        self.itm_head = Linear(config.text.width, 2)
        self.temperature = nn.Parameter(torch.full((1,), config.init_temperature))
        self._alone, self._fused = slice(0, config.text.first_cross), slice(config.text.first_cross, None)

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """A method by its name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    def states(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, P, D]; states as they are."""
        return self.visual(images) if images.ndim == 4 else images

    def embed_image(self, states: Tensor) -> Tensor:
        """States or pixels to unit vectors [B, E]."""
        return unit_norm(self.vision_proj(self.states(states)[:, 0]))

    def text_states(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """What the lower half makes of texts, int64 [B, T]; states as they are."""
        if tokens.is_floating_point():
            return tokens
        length = tokens.shape[1]
        return self.text(tokens, masks.lengths(num_text, length, length), layers=self._alone)

    def text_features(self, states: Tensor) -> Tensor:
        """[B, T, D] to unit vectors [B, E]."""
        return unit_norm(self.text_proj(states[:, 0]))

    def embed_text(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """int64 [B, T] to unit vectors [B, E]."""
        return self.text_features(self.text_states(tokens, num_text))

    def pairs(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> Pairs:
        """Of images [B, 3, S, S] and texts int64 [B, T], padded on the right, of which `num_text` [B] count."""
        states = self.states(images)
        words = self.text_states(tokens, num_text)
        features = self.embed_image(states), self.text_features(words)
        keys_values = self.text.image_keys_values(states, layers=self._fused)
        return Pairs(states, keys_values, words, *features, self.temperature.to(features[0].dtype))

    def match(self, states: Tensor, index: Tensor, texts: Tensor, num_text: Tensor) -> Tensor:
        """Whether texts match images: logits of no and yes [R, 2].

        Args:
            states: [N, P, D] of images, or pixels.
            index: int64 [R], the image of each text.
            texts: int64 [R, T], or states [R, T, D] of the lower half.
            num_text: integers [R].
        """
        return self.match_read([], states, index, texts, num_text)

    def match_read(
        self, read: Sequence[KeyValues], states: Tensor, index: Tensor, texts: Tensor, num_text: Tensor
    ) -> Tensor:
        """As `match`, of the images of `Pairs.keys_values` and, behind them, of those with these states."""
        more = self.text.image_keys_values(self.states(states), layers=self._fused)
        if read:
            both = zip(read, more, strict=True)
            more = [KeyValues(torch.cat([a.k, b.k]), torch.cat([a.v, b.v])) for a, b in both]
        return self.itm_head(self._fuse(texts, num_text, [KeyValues(*(x[index] for x in kv)) for kv in more])[:, 0])

    def _fuse(self, texts: Tensor, num_text: Tensor, images: Sequence[KeyValues]) -> Tensor:
        """[B, 1, D], the state of [CLS] at the top."""
        length = texts.shape[1]
        mask = masks.lengths(num_text, length, length)
        x = self.text_states(texts, num_text)
        return self.text(x, mask, images, layers=self._fused, pool=first)

    def words(
        self, images: Tensor | Sequence[KeyValues], tokens: Tensor, num_text: Tensor, where: Tensor | None = None
    ) -> Tensor:
        """Logits of words [B, T, V], or [M, V] at the M places of bool `where` [B, T].

        Args:
            images: pixels, states, or `Pairs.keys_values`.
            tokens: int64 [B, T], some hidden.
            num_text: integers [B].
        """
        read = self.states(images) if isinstance(images, Tensor) else images
        length = tokens.shape[1]
        x = self.text(tokens, masks.lengths(num_text, length, length), read)
        return self.text_head(x if where is None else x[where])
