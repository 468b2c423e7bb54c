"""ViLT: words and patches in one pre-LN transformer (arXiv 2102.03334)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.data.transforms.images import normalized
from mmcore.data.transforms.naflex import Patches
from mmcore.losses import transport_distance
from mmcore.nn import Linear, Packing, resized_positions
from mmcore.ops import require
from mmcore.parts.answers import AnswerHead
from mmcore.parts.text_head import TextHead
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.systems.siglip2.model import PatchEmbedding
from mmcore.systems.vilt.shapes import ViltConfig

_STD = 0.02  # of new weights of B/32


class Images(NamedTuple):
    """States of images one after the other, each with its class token before its patches: [M, D], and how many each
    image has."""

    states: Tensor
    counts: list[int]


class Kept(NamedTuple):
    """Which patches are read: int64 [K] of all images' N, and how many of each image."""

    places: Tensor
    counts: list[int]


class Stream(NamedTuple):
    """Texts and their images, packed row by row, text first: states [1, N, D], where they are, how many tokens each row
    has, and how many of them are text."""

    states: Tensor
    packing: Packing
    totals: list[int]
    lengths: list[int]


class Learned(NamedTuple):
    """What pretraining learns from, of this rank."""

    words: Tensor  # [], the sum of the hidden words' cross-entropies
    match: Tensor  # [B, 2], logits of no and yes
    distance: Tensor  # [B], of the text's words to the image's patches


class ViltTower(ViT):
    """A `ViT` whose patches come cut out, of images of unequal sizes; its blocks read them beside a text."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        patch = config.patch_size
        self.patch_embed = PatchEmbedding(3, config.width, patch, stride=patch, bias=config.has_patch_bias)

    def forward(self, images: Patches, kept: Kept | None = None) -> Images:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What the blocks read of images. Positions are those of a square grid, resized to each image's."""
        rows, patch = images.rows, self.config.patch_size
        wanted = [sum(images.counts), 3, patch, patch]
        require("ViLT", list(rows.shape) == wanted, "images must be {}, got {}", wanted, list(rows.shape))
        if rows.dtype == torch.uint8:
            rows = normalized(rows, self.config.image_mean, self.config.image_std)
        own: Any = self.position_embedding
        places, counts = resized_positions(own[1:], images.grids, align_corners=True), images.counts
        if kept is not None:
            rows, places, counts = rows[kept.places], places[kept.places], kept.counts
        dtype = self.patch_embed.weight.dtype
        x = self.patch_embed(rows.to(dtype)) + places.to(dtype)
        assert self.class_embedding is not None
        first = (self.class_embedding + own[0]).expand(len(counts), -1)
        # each image's class token before its patches
        starts, num = np.cumsum([0, *counts[:-1]]) if counts else [], len(x)
        each = enumerate(zip(starts, counts, strict=True))
        order = [np.concatenate([[num + i], np.arange(a, a + n)]) for i, (a, n) in each]
        return Images(torch.cat([x, first]).index_select(0, _index(order, x.device)), [1 + n for n in counts])


class TextEmbedding(nn.Module):
    """BERT's: words, places, the first segment, and a norm."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        width = config.vision.width
        self.word = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.randn(config.context_length, width) * _STD)
        self.type_embedding = nn.Parameter(torch.randn(config.num_types, width) * _STD)
        self.norm = nn.LayerNorm(width, eps=config.vision.norm_eps)
        nn.init.normal_(self.word.weight, std=_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] to [B, T, D]."""
        most = len(self.position_embedding)
        fits = tokens.ndim == 2 and tokens.shape[1] <= most
        require("ViLT", fits, "tokens must be [B, T] with T <= {}, got {}", most, list(tokens.shape))
        return self.norm(self.word(tokens) + self.position_embedding[: tokens.shape[1]] + self.type_embedding[0])


class TruthHead(nn.Module):
    """Linear, LayerNorm and GELU, Linear: of the states of a sample's images, joined, to answers."""

    def __init__(self, width: int, num_answers: int) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = Linear(width, width), nn.LayerNorm(width), Linear(width, num_answers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to logits [B, A]."""
        return self.fc2(F.gelu(self.norm(self.fc1(x))))


class ViLT(nn.Module):
    """The transformer with the head of its configuration; nothing is padded: each row's text and patches see each
    other."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vision.width
        self.visual = ViltTower(config.vision)
        self.text = TextEmbedding(config)
        self.modality = nn.Embedding(config.num_modalities, width)
        self.pooler = Linear(width, width)
        self.text_head = self.itm = self.head = None
        if config.head == "pretraining":
            self.text_head = TextHead(self.text.word, norm_eps=config.vision.norm_eps)
            self.itm = Linear(width, 2)
        elif config.head == "retrieval":
            self.head = Linear(width, 1)
        elif config.head == "answers":
            self.head = AnswerHead(width, config.num_answers)
        else:
            self.head = TruthHead(config.num_images * width, config.num_answers)
        nn.init.normal_(self.modality.weight, std=_STD)
        of_heads = [x for x in (self.text_head, self.itm, self.head) if x is not None]
        for layer in (m for part in (self.pooler, *of_heads) for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(layer.weight, std=_STD * (768 / width) ** 0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """`pretrain`, `words`, `match`, `answer`, `judge` or `states` by name: under ZeRO-3 parameters are whole only
        inside a forward."""
        return getattr(self, task)(*inputs, **options)

    # tasks

    def states(self, images: Patches, tokens: Tensor, num_text: Any) -> tuple[Stream, Tensor]:
        """The states of texts and images, and what the first of each row is pooled to, [B, D]."""
        stream = self._stream(self.visual(images), tokens, num_text)
        return stream, self._pooled(stream.states.index_select(1, stream.packing.starts)[0])

    def words(self, images: Patches, tokens: Tensor, num_text: Any) -> Tensor:
        """Logits [B, T, V] of the words of texts about images; anything behind a text's end."""
        assert self.text_head is not None
        size, length = tokens.shape
        stream = self._stream(self.visual(images), tokens, num_text)
        last = torch.tensor(stream.lengths, device=tokens.device)[:, None] - 1
        places = torch.minimum(torch.arange(length, device=tokens.device), last)
        rows = stream.packing.starts[:, None] + places
        return self.text_head(stream.states[0].index_select(0, rows.flatten()).view(size, length, -1))

    def match(self, images: Patches, image_index: Any, tokens: Tensor, num_text: Any) -> Tensor:
        """Whether texts match images: logits of no and yes, [R, 2].

        Args:
            images: N of them.
            image_index: [R], the image of each text, in [0, N).
            tokens: int64 [R, T], padded on the right.
            num_text: [R], how many tokens are no padding.
        """
        pooled = self._first(self.visual(images), tokens, num_text, _listed(image_index))
        if self.itm is not None:
            return self.itm(pooled)
        require("ViLT", self.config.head == "retrieval", "head must be one that matches, got {!r}", self.config.head)
        assert self.head is not None
        score = self.head(pooled)
        return torch.cat([torch.zeros_like(score), score], 1)

    def answer(self, images: Patches, tokens: Tensor, num_text: Any) -> Tensor:
        """Logits [B, A] of answers to questions about images."""
        assert self.head is not None
        return self.head(self._first(self.visual(images), tokens, num_text))

    def judge(self, images: Sequence[Patches], tokens: Tensor, num_text: Any) -> Tensor:
        """Logits [B, A] of what is said of several images of each sample: `images` are the first of all samples, the
        second of all, and so on."""
        assert self.head is not None
        num = self.config.num_images
        require("ViLT", len(images) == num, "images must be {} of each sample, got {}", num, len(images))
        pooled = [self._first(self.visual(x), tokens, num_text, kind=1 + i) for i, x in enumerate(images)]
        return self.head(torch.cat(pooled, 1))

    def pretrain(
        self,
        images: Patches,
        kept: Kept | None,
        tokens: Tensor,
        lengths: list[int],
        masked: Tensor,
        hidden: Tensor,
        wanted: Tensor,
        image_index: list[int],
    ) -> Learned:
        """Two passes: texts with hidden words about their own images, and texts about images that may be others'.

        Args:
            images, kept: of all samples, and which patches are read; None = all.
            tokens, masked: int64 [B, T], padded on the right, as they are and with words hidden.
            lengths: [B], how many are no padding.
            hidden: int64 [K], places among the B * T that are learned, in order; `wanted`, what was there.
            image_index: [B], which image each text is matched with.
        """
        assert self.text_head is not None and self.itm is not None
        seen = self.visual(images, kept)

        def learned(x: Tensor, packing: Packing) -> Tensor:
            row = hidden // masked.shape[1]
            return x.index_select(1, packing.starts[row] + hidden % masked.shape[1])

        hidden_words = self._stream(seen, masked, lengths, pool=learned)
        loss = self.text_head(hidden_words.states[0], wanted)
        stream = self._stream(seen, tokens, lengths, image_index)
        match = self.itm(self._pooled(stream.states.index_select(1, stream.packing.starts)[0]))
        return Learned(loss, match, self._distance(stream))

    # parts

    def _first(
        self, images: Images, tokens: Tensor, num_text: Any, image_index: Sequence[int] | None = None, kind: int = 1
    ) -> Tensor:
        """What the first state of each row is pooled to, [R, D]; nothing else is computed of the last layer."""

        def first(x: Tensor, packing: Packing) -> Tensor:
            return x.index_select(1, packing.starts)

        return self._pooled(self._stream(images, tokens, num_text, image_index, kind, first).states[0])

    def _pooled(self, x: Tensor) -> Tensor:
        return self.pooler(x).tanh()

    def _stream(
        self,
        images: Images,
        tokens: Tensor,
        num_text: Any,
        image_index: Sequence[int] | None = None,
        kind: int = 1,
        pool: Any = None,
    ) -> Stream:
        """Texts [R, T] before the images that they are about, by `image_index` or in order, through all layers."""
        lengths, device, length = _listed(num_text), tokens.device, tokens.shape[1]
        index = range(len(lengths)) if image_index is None else image_index
        counts, starts = images.counts, np.cumsum([len(lengths) * length, *images.counts])
        fits = len(index) == len(lengths) == len(tokens)
        what = "tokens must be of as many texts as there are lengths and images, got {}, {} and {}"
        require("ViLT", fits, what, len(tokens), len(lengths), len(index))
        order = []
        for row, (n, i) in enumerate(zip(lengths, index, strict=True)):
            order += [np.arange(row * length, row * length + n), np.arange(starts[i], starts[i] + counts[i])]
        both = torch.arange(self.config.num_modalities, device=device)
        of_text, of_image = self.modality(both)[0], self.modality(both)[kind]
        x = torch.cat([(self.text(tokens) + of_text).flatten(0, 1), images.states + of_image])
        totals = [n + counts[i] for n, i in zip(lengths, index, strict=True)]
        packing = Packing.of(totals, device, is_causal=False)
        options = {} if pool is None else {"pool": lambda states: pool(states, packing)}
        x = self.visual.transformer(x.index_select(0, _index(order, device))[None], packing, **options)
        return Stream(self.visual.norm_post(x), packing, totals, lengths)

    def _distance(self, stream: Stream) -> Tensor:
        """Of the words of each row, without the first and the last token, to its patches, without the class token."""
        packing, lengths, totals = stream.packing, np.array(stream.lengths), np.array(stream.totals)
        starts = np.cumsum(totals) - totals
        sides = []
        for first, count in ((starts + 1, lengths - 2), (starts + lengths + 1, totals - lengths - 1)):
            place = np.arange(max(1, count.max(initial=1)))
            seen = place < count[:, None]
            rows = torch.tensor(np.where(seen, first[:, None] + place, 0)).to(packing.starts.device)
            is_seen = torch.tensor(seen).to(rows.device)
            sides.append((stream.states[0].index_select(0, rows.flatten()).unflatten(0, rows.shape), is_seen))
        (words, of_text), (patches, of_image) = sides
        return transport_distance(words, patches, of_text, of_image)


def _listed(x: Any) -> list[int]:
    """Numbers on the host."""
    return x.tolist() if isinstance(x, Tensor) else list(x)


def _index(parts: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers of rows, one part after the other."""
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return torch.tensor(joined.astype(np.int64)).to(device, non_blocking=True)
