"""BLIP-2's first stage: a Q-Former that learns to match, tell apart and describe what a frozen tower sees."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.labels import IGNORED
from mmcore.nn import KeyValues, Linear
from mmcore.ops import accumulator, masks, require
from mmcore.parts.decoding import generate
from mmcore.parts.text_head import TextHead
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.systems.blip2.qformer import QFormer, QFormerConfig


@dataclass(frozen=True)
class BLIP2Config:
    """The frozen image tower, the Q-Former, and the width `embed_dim` of the space where images and texts meet; a text
    to generate begins with `decoder_token_id`, in place of its first token."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    embed_dim: int = 256
    decoder_token_id: int = 30522
    init_temperature: float = 0.07

    def __post_init__(self) -> None:
        op, vocab_size = "BLIP2Config", self.qformer.vocab_size
        require(op, self.embed_dim >= 1, "embed_dim must be at least 1, got {}", self.embed_dim)
        is_id = 0 <= self.decoder_token_id < vocab_size
        require(op, is_id, "decoder_token_id must be in [0, {}), got {}", vocab_size, self.decoder_token_id)
        widths = self.vision.width, self.qformer.image_width
        require(op, widths[0] == widths[1], "qformer.image_width must be vision.width {}, got {}", *widths)


class Pairs(NamedTuple):
    """What one pass over images and their texts gives."""

    image: Tensor  # [B, Q, E] unit norm
    text: Tensor  # [B, E] unit norm
    caption_loss: Tensor  # [], summed over the tokens of all captions
    num_tokens: Tensor  # [], int64, how many these are
    tower: Tensor  # [B, P, D] states of the image tower
    keys_values: list[KeyValues]  # of the images, in each layer that looks at them
    temperature: Tensor  # [1]


class BLIP2(nn.Module):
    """An image tower and a Q-Former with the heads of stage 1 (arXiv:2301.12597); with `freeze_vision` the tower is not
    trained, and stays in evaluation mode."""

    def __init__(self, config: BLIP2Config, *, freeze_vision: bool = True) -> None:
        super().__init__()
        require("BLIP2", config.qformer.has_text, "config.qformer must have has_text, got {}", False)
        self.config = config
        self.freeze_vision = freeze_vision
        self.visual = ViT(config.vision).requires_grad_(not freeze_vision)
        self.norm_vision = nn.LayerNorm(config.vision.width, eps=config.vision.norm_eps)
        self.qformer = QFormer(config.qformer)
        assert self.qformer.text is not None
        width = config.qformer.width
        self.vision_proj = Linear(width, config.embed_dim)
        self.text_proj = Linear(width, config.embed_dim)
        self.itm_head = Linear(width, 2)
        self.text_head = TextHead(self.qformer.text.word, norm_eps=config.qformer.norm_eps)
        # a divisor, neither a log nor clamped
        self.temperature = nn.Parameter(torch.full((1,), config.init_temperature))

    def train(self, mode: bool = True) -> "BLIP2":
        super().train(mode)
        self.visual.train(mode and not self.freeze_vision)
        return self

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """`encode_image`, `encode_text`, `pairs`, `match` or `generate` by name: under ZeRO-3 parameters are whole only
        inside a forward."""
        return getattr(self, task)(*inputs, **options)

    def encode_image(self, images: Tensor) -> Tensor:
        """What the queries read of [B, 3, S, S] images, or [B, P, D] states of the tower: [B, Q, E] float32, unit
        norm."""
        return _unit_norm(self.vision_proj(self.qformer(self.states(images))))

    def encode_text(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Embeddings of texts, at their first token: [B, E] float32, unit norm; arguments as of `pairs`."""
        length = tokens.shape[1]
        x = self.qformer(tokens=tokens, mask=masks.lengths(num_text, length, length))
        return _unit_norm(self.text_proj(x[:, 0]))

    def pairs(self, images: Tensor, tokens: Tensor, num_text: Tensor, label_smoothing: float = 0.1) -> Pairs:
        """Contrastive features and the captions' loss, in one pass over `[queries; text; text to generate]`.

        Args:
            images: [B, 3, S, S], or [B, P, D] states of the tower.
            tokens: int64 [B, T], padded on the right.
            num_text: integers [B], how many tokens are no padding.
            label_smoothing: of the captions' loss.
        """
        num_queries, length = self.config.qformer.num_queries, tokens.shape[1]
        tower = self.tower(images)
        keys_values = self.qformer.image_keys_values(self.norm_vision(tower))
        place = torch.arange(length, device=tokens.device)
        start = torch.full_like(tokens[:, :1], self.config.decoder_token_id)
        x = self.qformer(
            keys_values,
            torch.cat([tokens, start, tokens[:, 1:]], 1),
            mask=masks.qformer_pairs(num_queries, num_text, length),
            places=torch.cat([place, place]),
        )
        queries, text, generated = x.split([num_queries, length, length], 1)
        is_padding = place >= num_text[:, None]
        labels = tokens.masked_fill(is_padding, IGNORED)[:, 1:]
        return Pairs(
            _unit_norm(self.vision_proj(queries)),
            _unit_norm(self.text_proj(text[:, 0])),
            self.text_head(generated[:, :-1], labels, label_smoothing=label_smoothing),
            (labels != IGNORED).sum(),
            tower,
            keys_values,
            self.temperature.float(),
        )

    def match(
        self,
        keys_values: Sequence[KeyValues] | None,
        images: Tensor,
        image_index: Tensor,
        tokens: Tensor,
        num_text: Tensor,
    ) -> Tensor:
        """Whether texts match images: logits of no and yes, averaged over the queries, [R, 2].

        Args:
            keys_values: `Pairs.keys_values` of N images; None = of none.
            images: [M, 3, S, S] or [M, P, D] states of the tower, of more images; M may be 0.
            image_index: int64 [R], the image of each text, in [0, N + M).
            tokens: int64 [R, T], padded on the right.
            num_text: integers [R], how many tokens are no padding.
        """
        more = self.qformer.image_keys_values(self.states(images))
        if keys_values is not None:
            both = zip(keys_values, more, strict=True)
            more = [KeyValues(torch.cat([a.k, b.k]), torch.cat([a.v, b.v])) for a, b in both]
        chosen = [KeyValues(kv.k[image_index], kv.v[image_index]) for kv in more]
        num_queries = self.config.qformer.num_queries
        x = self.qformer(chosen, tokens, mask=masks.qformer_itm(num_queries, num_text, tokens.shape[1]))
        return self.itm_head(x[:, :num_queries]).mean(1)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        max_length: int = 30,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        eos_token_id: int,
    ) -> Tensor:
        """Captions: the likeliest token at each step, by beam search, or drawn from the nucleus. A ValueError of an
        option out of its range, or without effect beside the others.

        Args:
            images: [B, 3, S, S], or [B, P, D] states of the tower.
            max_length: most tokens of a caption, from 1 to the Q-Former's `max_text`.
            num_beams: of `beam_search`; 1 = none.
            top_p: in (0, 1], share of the probability that tokens are drawn from; None = the likeliest token.
            temperature: above 0, divides the logits of what is drawn.
            generator: of what is drawn, on the device of the images; None = torch's own.
            eos_token_id: what ends a caption, such as BERT's [SEP].

        Returns:
            int64 [B, T], T <= max_length, without `decoder_token_id`, padded with `pad_token_id` after the end.
        """
        op, shape, most = "BLIP2.generate", self.config.qformer, self.config.qformer.max_text
        require(op, 1 <= max_length <= most, "max_length must be in [1, {}], got {}", most, max_length)
        is_id = 0 <= eos_token_id < shape.vocab_size
        require(op, is_id, "eos_token_id must be in [0, {}), got {}", shape.vocab_size, eos_token_id)
        caches, places = self.qformer.new_caches(), count()
        self.qformer(self.states(images), caches=caches)

        def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if rows is not None:
                for cache in caches:
                    cache.select(rows)
            place = torch.full((1,), next(places), device=tokens.device)
            return self.text_head(self.qformer(tokens=tokens[:, None], places=place, caches=caches)[:, 0])

        start = torch.full((len(images),), self.config.decoder_token_id, device=images.device)
        ends: dict[str, Any] = {"max_length": max_length, "eos_token_id": eos_token_id}
        ends["pad_token_id"] = shape.pad_token_id
        options = {"num_beams": num_beams, "top_p": top_p, "temperature": temperature, "generator": generator}
        return generate(op, step, start, **ends, **options)

    def states(self, images: Tensor) -> Tensor:
        """What the Q-Former reads of [B, 3, S, S] pixels or [B, P, D] states of the tower: [B, P, D]."""
        return self.norm_vision(self.tower(images))

    def tower(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] pixels to the tower's states [B, P, D]; states as they are."""
        if images.ndim != 4:
            return images
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            return self.visual(images)


def _unit_norm(x: Tensor) -> Tensor:
    return F.normalize(x.to(accumulator(x.dtype)), dim=-1)
