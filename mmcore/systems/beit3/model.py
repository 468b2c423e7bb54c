"""BEiT-3: one transformer whose experts, and where it is decoupled its attention too, are one a modality (arXiv
2208.10442)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.nn import KeyValueCache, Linear, MultiwayBlock
from mmcore.nn.multiway import by_expert
from mmcore.ops import linear_cross_entropy, masks, require
from mmcore.parts.answers import AnswerHead
from mmcore.parts.decoding import beam_search, check_decoding, decode, nucleus
from mmcore.parts.vit import PatchEmbedding, VisionConfig

Head = Literal["pretraining", "retrieval", "captioning", "answers"]


@dataclass(frozen=True)
class Beit3Config:
    """Shape of the transformer, which `vision` says but for what words need.

    Args:
        vision: with a class token, a mask token and learned positions.
        num_text: places of words.
        decoupled: attention and its norms are one a modality too, as in the published base and large; off = shared, as
            the paper's giant has them.
        head: what it ends in; one that answers has no final norm, but one in its pooler.
        num_codes: of patches, which pretraining predicts.
        num_answers: of a classifier of questions.
        init_std: of the initial weights.
    """

    vision: VisionConfig
    vocab_size: int = 64010
    pad_token_id: int = 1
    num_text: int = 1022
    decoupled: bool = True
    head: Head = "pretraining"
    num_codes: int = 8192
    num_answers: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        op, vision = "Beit3Config", self.vision
        for name in ("vocab_size", "num_text", "num_codes"):
            require(op, getattr(self, name) >= 1, "{} must be at least 1, got {}", name, getattr(self, name))
        fits = vision.has_class_token and vision.has_mask_token and vision.positions == "learned"
        fits &= vision.has_patch_bias and vision.relative_positions == "none" and not vision.num_registers
        fits &= not vision.has_norm_pre and not vision.has_swiglu and vision.layer_scale is None
        what = "vision must have a class and a mask token, learned positions and biases, and no more, got {}"
        require(op, fits and vision.qkv_bias == "all", what, vision)
        has_answers = (self.head == "answers") == (self.num_answers > 0)
        require(op, has_answers, "num_answers must come with head {!r}, got {}", "answers", self.num_answers)


class TextEmbedding(nn.Module):
    """Words and their places."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        width = config.vision.width
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.zeros(config.num_text, width))

    def forward(self, tokens: Tensor, first_place: int = 0) -> Tensor:
        """int64 [B, T], the first of them at a place of its text, to [B, T, D]."""
        last, most = first_place + tokens.shape[1], len(self.position_embedding)
        require("BEiT3", last <= most, "tokens must be at most {} a text, got {}", most, last)
        return self.word_embedding(tokens) + self.position_embedding[first_place:last]


class ClassHead(Linear):
    """States to classes: words, or codes of patches."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, labels: Tensor | None = None, *, label_smoothing: float = 0.0
    ) -> Tensor:
        """[..., D] to logits [..., V]; with int64 labels [...], -100 where there is none, to the sum of the
        cross-entropies."""
        if labels is None:
            return super().forward(x)
        rows, options = x.flatten(0, -2), {"label_smoothing": label_smoothing, "reduction": "sum"}
        return linear_cross_entropy(rows, self.weight, labels.flatten(), bias=self.bias, **options)


class BEiT3(nn.Module):
    """`image_embed`, `text_embed`, the `blocks`, a final norm of each modality, and heads."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        vision, width = config.vision, config.vision.width
        self.image_embed, self.text_embed = PatchEmbedding(vision), TextEmbedding(config)
        num = vision.num_layers
        shares = [vision.drop_path * i / max(1, num - 1) for i in range(num)]
        options: Any = {"activation": vision.activation, "norm_eps": vision.norm_eps, "sub_norm": True}
        self.blocks = nn.ModuleList(
            MultiwayBlock(
                width, vision.num_heads, vision.mlp_dim, decoupled=config.decoupled, drop_path=share, **options
            )
            for share in shares
        )
        self.norm = None
        if config.head != "answers":
            count = 2 if config.decoupled else 1
            self.norm = nn.ModuleList(nn.LayerNorm(width, eps=vision.norm_eps) for _ in range(count))
        if config.head in ("pretraining", "captioning"):
            self.text_head = ClassHead(width, config.vocab_size)
        if config.head == "pretraining":
            self.code_head = ClassHead(width, config.num_codes)
        if config.head == "retrieval":
            self.image_proj, self.text_proj = (Linear(width, width, bias=False) for _ in range(2))
            self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        if config.head == "answers":
            self.pool_norm, self.pooler = nn.LayerNorm(width, eps=vision.norm_eps), Linear(width, width)
            self.answer_head = AnswerHead(width, config.num_answers)
        self.coder: Callable[[Tensor], Tensor] | None = None  # images to codes, int64 [B, P], of what does not learn
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Normal numbers, those of values and residuals grown by sqrt(log(2 L)), as Sub-LN wants it
        (arXiv:2210.06423); biases 0."""
        std, growth = self.config.init_std, math.sqrt(math.log(2 * self.config.vision.num_layers))
        drawn = [self.image_embed.class_embedding, self.image_embed.position_embedding, self.image_embed.mask_token]
        drawn.append(self.text_embed.position_embedding)
        drawn += [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
        for x in drawn:
            assert x is not None
            x.normal_(std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.zero_()
        for name, p in self.blocks.named_parameters():
            if p.ndim == 2 and (".mlps." in name or ".attn.out" in name):
                p.mul_(growth)
            if p.ndim == 2 and ".attn.qkv" in name:
                p[2 * len(p) // 3 :].mul_(growth)  # values

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """A method by its name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    # the transformer

    def _run(
        self, x: Tensor, sizes: tuple[int, int], mask: masks.Mask | None, caches: Sequence[KeyValueCache] | None = None
    ) -> Tensor:
        """[B, T, D] of so many patches and words through all blocks and the final norm."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and caches is None
        for i, block in enumerate(self.blocks):
            inputs = x, sizes, mask
            if recompute:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs, None if caches is None else caches[i])
        if self.norm is None:
            return x
        return by_expert(x, sizes if self.config.decoupled else (x.shape[1],), self.norm)

    def image_states(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """[B, 3, S, S], of whose patches those of `masked`, bool [B, P], are not shown, to [B, 1 + P, D]."""
        x = self.image_embed(images, masked)
        return self._run(x, (x.shape[1], 0), None)

    def text_states(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """int64 [B, T], padded on the right, of which `num_text` [B] count, to [B, T, D]."""
        length = tokens.shape[1]
        return self._run(self.text_embed(tokens), (0, length), masks.lengths(num_text, length, length))

    def states(
        self, images: Tensor, tokens: Tensor, num_text: Tensor, masked: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        """Images and texts together, [B, 1 + P + T, D], patches first. Of a causal text each word sees those before it
        and the image, which sees itself."""
        patches = self.image_embed(images, masked)
        x, num = torch.cat([patches, self.text_embed(tokens)], 1), patches.shape[1]
        total = x.shape[1]
        mask = masks.lengths(num_text + num, total, total)
        if is_causal:
            mask = masks.prefix_causal(torch.full_like(num_text, num), total) & mask
        return self._run(x, (num, tokens.shape[1]), mask)

    # pretraining

    def pretrain(
        self,
        images: Tensor,
        masked: Tensor,
        num_text: Tensor,
        alone: Tensor,
        alone_labels: Tensor,
        beside: Tensor,
        beside_labels: Tensor,
    ) -> tuple[Tensor, ...]:
        """Sums [] of cross-entropies: of the codes of masked patches of images alone, of the hidden words of texts
        alone, and of both of them together.

        Args:
            images: [B, 3, S, S].
            masked: bool [B, P], the patches that are not shown.
            num_text: int64 [B], how many tokens of a text are no padding.
            alone, beside: int64 [B, T], texts with hidden words, alone and beside the images.
            alone_labels, beside_labels: int64 [B, T], what was hidden, -100 elsewhere.
        """
        assert self.coder is not None
        with torch.no_grad():
            codes = self.coder(images).masked_fill(~masked, -100)
        of_images = self.code_head(self.image_states(images, masked)[:, 1:], codes)
        of_texts = self.text_head(self.text_states(alone, num_text), alone_labels)
        states = self.states(images, beside, num_text, masked)
        patches, words = states[:, 1 : -beside.shape[1]], states[:, -beside.shape[1] :]
        return of_images, of_texts, self.code_head(patches, codes), self.text_head(words, beside_labels)

    def codes(self, images: Tensor, masked: Tensor) -> Tensor:
        """Logits of codes [B, P, C] of images with masked patches."""
        return self.code_head(self.image_states(images, masked)[:, 1:])

    def words(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Logits of words [B, T, V] of texts about images."""
        return self.text_head(self.states(images, tokens, num_text)[:, -tokens.shape[1] :])

    # fine-tuning

    def embed_image(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D]."""
        return _unit(self.image_proj(self.image_states(images)[:, 0]))

    def embed_text(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Unit vectors [B, D] of texts, see `text_states`."""
        return _unit(self.text_proj(self.text_states(tokens, num_text)[:, 0]))

    def pairs(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of images and texts, and the scale [1]."""
        image, text = self.embed_image(images), self.embed_text(tokens, num_text)
        return image, text, self.logit_scale.exp().to(image.dtype)

    def answer(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Logits [B, A] of answers to questions about images."""
        x = self.states(images, tokens, num_text)[:, 0]
        return self.answer_head(torch.tanh(self.pooler(self.pool_norm(x))))

    def learn_captions(
        self, images: Tensor, tokens: Tensor, num_text: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
    ) -> Tensor:
        """The sum [] of the cross-entropies of hidden words, each of which sees the image and the words before it;
        smoothed labels give `label_smoothing` / (V - 1) to every other word, as published."""
        states = self.states(images, tokens, num_text, is_causal=True)[:, -tokens.shape[1] :]
        # torch's gives a share of it to the label too
        vocab_size = self.config.vocab_size
        smoothing = label_smoothing * vocab_size / (vocab_size - 1) if vocab_size > 1 else 0.0
        return self.text_head(states, labels, label_smoothing=smoothing)

    @torch.no_grad()
    def say(
        self,
        images: Tensor,
        *,
        start_token_id: int,
        mask_token_id: int,
        eos_token_id: int,
        max_length: int,
        num_beams: int = 1,
        top_p: float | None = None,
    ) -> Tensor:
        """Captions, int64 [B, T], T below `max_length`, without the first token, padded after the end: each next word
        is what stands for a [MASK] behind the words so far. By the likeliest word, beams, or drawn from the nucleus."""
        op, batch = "say", len(images)
        check_decoding(op, num_beams=num_beams, top_p=top_p, temperature=1.0, generator=None)
        most = self.config.num_text
        require(op, 2 <= max_length <= most, "max_length must be from 2 to {}, got {}", most, max_length)
        caches = [KeyValueCache() for _ in self.blocks]
        patches = self.image_embed(images)
        self._run(patches, (patches.shape[1], 0), None, caches)
        place = 0

        def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
            nonlocal place
            if rows is not None:
                for cache in caches:
                    cache.select(rows)
            both = torch.stack([tokens, torch.full_like(tokens, mask_token_id)], 1)
            x = self.text_embed(both, place)
            mask = masks.causal(2, patches.shape[1] + place + 2, device=x.device)
            states = self._run(x, (0, 2), mask, caches)
            for cache in caches:
                cache.drop(1)  # the [MASK]
            place += 1
            return self.text_head(states[:, 1])

        start = torch.full((batch,), start_token_id, device=images.device)
        ends = {"max_length": max_length - 1, "eos_token_id": eos_token_id, "pad_token_id": self.config.pad_token_id}
        if num_beams > 1:
            return beam_search(step, start, num_beams=num_beams, **ends)
        pick = partial(torch.argmax, dim=1) if top_p is None else partial(nucleus, top_p=top_p)
        return decode(step, start, pick, **ends)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
