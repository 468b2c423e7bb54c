"""LXMERT: layers of words and of regions, and layers in which each reads the other (arXiv 1908.07490)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data.regions import Regions
from mmcore.nn import CrossAttention, Linear, PostNormBlock
from mmcore.nn.qformer import AddNorm
from mmcore.ops import masks
from mmcore.parts.answers import AnswerHead
from mmcore.parts.bert import BertConfig, BertEncoder
from mmcore.parts.text_head import TextHead
from mmcore.systems.lxmert.shapes import LxmertConfig

_STD = 0.02  # of new weights of the base model


class Masks(NamedTuple):
    """What words and regions see of words and of regions."""

    words_words: masks.Mask
    words_regions: masks.Mask
    regions_words: masks.Mask
    regions_regions: masks.Mask


class Learned(NamedTuple):
    """What pretraining learns from, of this rank."""

    words: Tensor  # [], the sum of the hidden words' cross-entropies
    match: Tensor  # [B, 2], logits of no and yes
    features: Tensor  # [B, N, F], predicted
    objects: Tensor | None  # [B, N, O]
    attributes: Tensor | None  # [B, N, A]
    answers: Tensor | None  # [B, A]


class RegionEmbedding(nn.Module):
    """(LN(W features) + LN(V box)) / 2."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__()
        width, eps = config.text.width, config.text.norm_eps
        self.fc, self.norm = Linear(config.feature_width, width), nn.LayerNorm(width, eps=eps)
        self.box, self.box_norm = Linear(4, width), nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.text.dropout)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """[B, N, F] and [B, N, 4] to [B, N, D]."""
        dtype = self.fc.weight.dtype
        x, y = self.norm(self.fc(features.to(dtype))), self.box_norm(self.box(boxes.to(dtype)))
        return self.dropout((x + y) / 2)


def _block(config: BertConfig) -> PostNormBlock:
    options: dict[str, Any] = {"dropout": config.dropout, "attention_dropout": config.attention_dropout}
    options |= {"activation": config.activation, "norm_eps": config.norm_eps}
    return PostNormBlock(config.width, config.num_heads, config.mlp_dim, **options)


class CrossLayer(nn.Module):
    """Words read regions and regions read words, by one set of weights and from the states before either; then a layer
    of each."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.cross = CrossAttention(config.width, config.num_heads, dropout=config.attention_dropout)
        self.cross_norm = AddNorm(config.width, dropout=config.dropout, norm_eps=config.norm_eps)
        self.text, self.image = _block(config), _block(config)

    def forward(self, words: Tensor, regions: Tensor, seen: Masks) -> tuple[Tensor, Tensor]:
        """[B, T, D] and [B, N, D] to the same."""
        x = self.cross_norm(words, self.cross(words, regions, seen.words_regions))
        y = self.cross_norm(regions, self.cross(regions, words, seen.regions_words))
        return self.text(x, seen.words_words), self.image(y, seen.regions_regions)


class RegionHead(nn.Module):
    """States of regions to their features, and to objects and attributes where a detector tells some apart."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__()
        width = config.text.width
        self.transform = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.text.norm_eps)
        self.feat = Linear(width, config.feature_width)
        self.obj = Linear(width, config.num_objects) if config.num_objects else None
        self.attr = Linear(width, config.num_attributes) if config.num_attributes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, N, D] to [B, N, F], [B, N, O] and [B, N, A]."""
        x = self.norm(F.gelu(self.transform(x)))
        objects = None if self.obj is None else self.obj(x)
        return self.feat(x), objects, None if self.attr is None else self.attr(x)


class LXMERT(nn.Module):
    """The layers with the heads of their configuration."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__()
        self.config = config
        text, width = config.text, config.text.width
        self.text = BertEncoder(text)
        self.embed = RegionEmbedding(config)
        self.regions = nn.ModuleList(_block(text) for _ in range(config.region_layers))
        self.cross = nn.ModuleList(CrossLayer(text) for _ in range(config.cross_layers))
        self.pooler = Linear(width, width)
        self.text_head = self.itm = self.region_head = self.head = None
        if config.head == "pretraining":
            self.text_head = TextHead(self.text.word_embedding, norm_eps=text.norm_eps)
            self.itm, self.region_head = Linear(width, 2), RegionHead(config)
        if config.num_answers:
            self.head = AnswerHead(width, config.num_answers, order="gelu first", norm_eps=text.norm_eps)
        parts = (self.embed, self.regions, self.cross, self.pooler, self.text_head, self.itm, self.region_head)
        for module in (m for part in parts if part is not None for m in part.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD * (768 / width) ** 0.5)
                nn.init.zeros_(module.bias)

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """`pretrain`, `words`, `match`, `answer` or `states` by name: under ZeRO-3 parameters are whole only inside a
        forward."""
        return getattr(self, task)(*inputs, **options)

    def states(
        self, regions: Regions, tokens: Tensor, num_text: Any, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States of words [B, T, D] and of regions [B, N, D], and what the first word's is pooled to, [B, D].

        Args:
            regions: of B images.
            tokens: int64 [B, T], padded on the right.
            num_text: [B], how many are no padding.
            features: [B, N, F] in place of the regions' own, some of them hidden.
        """
        x, num = self.embed(regions.features if features is None else features, regions.boxes), regions.counts
        lengths = torch.as_tensor(num_text, device=tokens.device)
        words, length, size = lengths.to(x.device), tokens.shape[1], x.shape[1]
        seen = Masks(
            masks.lengths(words, length, length),
            masks.lengths(num, length, size),
            masks.lengths(words, size, length),
            masks.lengths(num, size, size),
        )
        text: Any = self.text(tokens, seen.words_words)
        for block in self.regions:
            x = block(x, seen.regions_regions)
        for layer in self.cross:
            text, x = layer(text, x, seen)
        return text, x, self.pooler(text[:, 0]).tanh()

    def words(self, regions: Regions, tokens: Tensor, num_text: Any) -> Tensor:
        """Logits [B, T, V] of the words of texts about images."""
        assert self.text_head is not None
        return self.text_head(self.states(regions, tokens, num_text)[0])

    def match(self, regions: Regions, image_index: Any, tokens: Tensor, num_text: Any) -> Tensor:
        """Whether texts match images: logits of no and yes, [R, 2]; `image_index` [R] is the image of each text."""
        assert self.itm is not None
        index = image_index.tolist() if isinstance(image_index, Tensor) else list(image_index)
        return self.itm(self.states(regions.take(index), tokens, num_text)[2])

    def answer(self, regions: Regions, tokens: Tensor, num_text: Any) -> Tensor:
        """Logits [B, A] of answers to questions about images."""
        assert self.head is not None
        return self.head(self.states(regions, tokens, num_text)[2])

    def pretrain(
        self, regions: Regions, features: Tensor, tokens: Tensor, num_text: Tensor, hidden: Tensor, wanted: Tensor
    ) -> Learned:
        """One pass over texts and regions with some of both hidden, for all objectives.

        Args:
            regions: of B images.
            features: [B, N, F], with some hidden.
            tokens: int64 [B, T], with words hidden, padded on the right.
            num_text: int64 [B], how many are no padding.
            hidden: int64 [K], places among the B * T that are learned; `wanted`, what was there.
        """
        assert self.text_head is not None and self.itm is not None and self.region_head is not None
        text, x, pooled = self.states(regions, tokens, num_text, features)
        words = self.text_head(text.flatten(0, 1).index_select(0, hidden), wanted)
        answers = None if self.head is None else self.head(pooled)
        predicted, objects, attributes = self.region_head(x)
        return Learned(words, self.itm(pooled), predicted, objects, attributes, answers)
