"""BLIP: an image tower, and BERTs that read images in every layer, as an encoder, a decoder, or both (arXiv
2201.12086)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmcore.nn import KeyValues, Linear
from mmcore.ops import masks, require
from mmcore.parts.bert import BertConfig, BertEncoder
from mmcore.parts.text_decoder import TextDecoder
from mmcore.parts.text_head import TextHead
from mmcore.parts.vit import VisionConfig, ViT
from mmcore.systems.albef.align import Pairs
from mmcore.systems.albef.model import first, unit_norm
from mmcore.systems.albef.vqa import AnswersInWords

Kind = Literal["pretrain", "retrieval", "caption", "vqa"]
"""Which parts a model has: an encoder that is a decoder too but for its self-attention; an encoder; a decoder; an
encoder and a decoder that reads what it made."""


@dataclass(frozen=True)
class BLIPConfig:
    """Both towers, the width of the space where they meet, the tokens that a text begins with where it is read with an
    image and where it is written, and the one that ends it."""

    vision: VisionConfig
    text: BertConfig
    embed_dim: int = 256
    kind: Kind = "pretrain"
    decoder_token_id: int = 30522
    encoder_token_id: int = 30523
    end_token_id: int = 102
    label_smoothing: float = 0.1
    init_temperature: float = 0.07

    def __post_init__(self) -> None:
        op, sizes = "BLIPConfig", (self.vision.width, self.text.image_width)
        require(op, self.embed_dim >= 1, "embed_dim must be at least 1, got {}", self.embed_dim)
        require(op, sizes[0] == sizes[1], "text.image_width must be vision.width {}, got {}", *sizes)
        require(op, self.kind in get_args(Kind), "kind must be one of {}, got {!r}", get_args(Kind), self.kind)
        for name in ("decoder_token_id", "encoder_token_id", "end_token_id"):
            value, size = getattr(self, name), self.text.vocab_size
            require(op, 0 <= value < size, "{} must be in [0, {}), got {}", name, size, value)

    @property
    def has_encoder(self) -> bool:
        return self.kind != "caption"

    @property
    def has_heads(self) -> bool:
        """Of contrast and matching."""
        return self.kind in ("pretrain", "retrieval")


class BLIP(AnswersInWords):
    """`visual`; `text`, the encoder, which in pretraining is the decoder too; else `decoder`; `text_head` where there
    is one; the heads of contrast and matching."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__()
        self.config, text, width = config, config.text, config.text.width
        self.answer_smoothing = config.label_smoothing
        self.visual = ViT(config.vision)
        self.text = self.decoder = self.text_head = None
        if config.has_encoder:
            self.text = BertEncoder(replace(text, has_decoder=config.kind == "pretrain"))
        if config.kind == "caption":
            self.decoder = BertEncoder(text)
        if config.kind == "vqa":
            self.decoder = BertEncoder(replace(text, image_width=width))
        writer = self.text if config.kind == "pretrain" else self.decoder
        if writer is not None:
            self.text_head = TextHead(writer.word_embedding, norm_eps=text.norm_eps)
        if config.has_heads:
            self.vision_proj = Linear(config.vision.width, config.embed_dim)
            self.text_proj = Linear(width, config.embed_dim)
            self.itm_head = Linear(width, 2)
            self.temperature = nn.Parameter(torch.full((1,), config.init_temperature))

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """A method by its name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    @property
    def encoder(self) -> BertEncoder:
        assert self.text is not None
        return self.text

    def begun(self, tokens: Tensor, token_id: int) -> Tensor:
        """Tokens [B, T] with another first one."""
        return torch.cat([torch.full_like(tokens[:, :1], token_id), tokens[:, 1:]], 1)

    def states(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, P, D]; states as they are."""
        return self.visual(images) if images.ndim == 4 else images

    def embed_image(self, states: Tensor) -> Tensor:
        """States or pixels to unit vectors [B, E]."""
        return unit_norm(self.vision_proj(self.states(states)[:, 0]))

    def embed_text(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """int64 [B, T] to unit vectors [B, E]."""
        return unit_norm(self.text_proj(self._alone(tokens, num_text)[:, 0]))

    def _alone(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        length = tokens.shape[1]
        return self.encoder(tokens, masks.lengths(num_text, length, length), pool=first)

    def pairs(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> Pairs:
        """Of images [B, 3, S, S] and texts int64 [B, T], padded on the right, of which `num_text` [B] count."""
        states, words = self.states(images), self._alone(tokens, num_text)
        features = self.embed_image(states), unit_norm(self.text_proj(words[:, 0]))
        temperature = self.temperature.to(features[0].dtype)
        return Pairs(states, self.encoder.image_keys_values(states), words, *features, temperature)

    def match(self, states: Tensor, index: Tensor, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Whether texts match images: logits of no and yes [R, 2].

        Args:
            states: [N, P, D] of images, or pixels.
            index: int64 [R], the image of each text.
            tokens: int64 [R, T], whose first becomes [ENC].
            num_text: integers [R].
        """
        return self.match_read([], states, index, tokens, num_text)

    def match_read(
        self, read: Sequence[KeyValues], states: Tensor, index: Tensor, tokens: Tensor, num_text: Tensor
    ) -> Tensor:
        """As `match`, of the images of `Pairs.keys_values` and, behind them, of those with these states."""
        more, length = self.encoder.image_keys_values(self.states(states)), tokens.shape[1]
        if read:
            both = zip(read, more, strict=True)
            more = [KeyValues(torch.cat([a.k, b.k]), torch.cat([a.v, b.v])) for a, b in both]
        images = [KeyValues(kv.k[index], kv.v[index]) for kv in more]
        tokens = self.begun(tokens, self.config.encoder_token_id)
        return self.itm_head(self.encoder(tokens, masks.lengths(num_text, length, length), images, pool=first)[:, 0])

    def writer(self, images: Tensor | Sequence[KeyValues]) -> TextDecoder:
        """What captions are written by, of pixels, states, or `Pairs.keys_values`."""
        bert = self.text if self.config.kind == "pretrain" else self.decoder
        assert bert is not None and self.text_head is not None
        read = bert.image_keys_values(self.states(images)) if isinstance(images, Tensor) else images
        return TextDecoder(bert, self.text_head, read)

    def captions(
        self, images: Tensor | Sequence[KeyValues], tokens: Tensor, num_text: Tensor, num_prompt: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of captions int64 [B, T], whose first token becomes [DEC], behind their `num_prompt` first
        tokens, summed, and how many tokens there are."""
        begun, smoothing = self.begun(tokens, self.config.decoder_token_id), self.config.label_smoothing
        return self.writer(images).losses(begun, num_text, num_prompt=num_prompt, label_smoothing=smoothing)

    def describe(self, images: Tensor, start: Tensor, **options: Any) -> Tensor:
        """Captions that go on from int64 [B, P], whose first token becomes [DEC]; see `TextDecoder.generate`."""
        return self.writer(images).generate(self.begun(start, self.config.decoder_token_id), **options)

    def reader(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> TextDecoder:
        """What answers are written by, of images and of questions int64 [B, T], whose first token becomes [ENC]."""
        length = tokens.shape[1]
        tokens = self.begun(tokens, self.config.encoder_token_id)
        states = self.encoder(tokens, masks.lengths(num_text, length, length), self.states(images))
        assert self.decoder is not None and self.text_head is not None
        return TextDecoder(self.decoder, self.text_head, self.decoder.image_keys_values(states), num_text)

    def first_token(self, tokens: Tensor) -> Tensor:
        return torch.full_like(tokens[:, :1], self.config.decoder_token_id)


def fitting(state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Weights of a BLIP of any kind by the names of another kind: an encoder that is a decoder too gives both, and what
    it does not have is not there."""
    is_shared = any(".decoder_attn." in name for name in state)
    found = {name: x for name, x in state.items() if not is_shared or ".decoder_attn" not in name}
    if is_shared and kind == "pretrain":
        return dict(state)
    if is_shared and kind in ("caption", "vqa"):
        for name, x in state.items():
            own = name.replace("decoder_attn", "attn")
            is_other = name.startswith("text.") and own == name and (".attn." in name or ".attn_norm." in name)
            if name.startswith("text.") and not is_other:
                found[f"decoder.{own.removeprefix('text.')}"] = x
    return found
