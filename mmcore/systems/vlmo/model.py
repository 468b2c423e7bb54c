"""VLMo: one transformer for images, texts and both, whose feed-forwards are one a modality (arXiv 2111.02358)."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmcore.nn import Linear, MultiwayBlock, MultiwayPositions
from mmcore.ops import masks, require
from mmcore.parts.answers import AnswerHead
from mmcore.parts.text_head import TextHead
from mmcore.parts.vit import PatchEmbedding, Tower, VisionConfig, ViT

TEXT, IMAGE, BOTH = 0, 1, 2
"""Experts of a block; the last is of the upper blocks alone."""


@dataclass(frozen=True)
class VlmoConfig:
    """Shape of the transformer, which `vision` says but for what words need.

    Args:
        vision: with positions in a table of distances ("layers") or learned for each place, or both; words have as
            many kinds. Its `drop_path` is the dropout of what words begin with too.
        num_text: places of words that have learned positions.
        num_distances: the longest text whose distances are in the table.
        num_joint: blocks, the last, that have an expert of images and texts together.
        num_answers: of a classifier of questions, which has no other head; 0 = the heads of pretraining.
        init_std: of the initial weights.
    """

    vision: VisionConfig
    vocab_size: int = 30522
    pad_token_id: int = 0
    num_text: int = 40
    num_distances: int = 196
    num_joint: int = 2
    num_answers: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        op, vision = "VlmoConfig", self.vision
        for name in ("vocab_size", "num_text"):
            require(op, getattr(self, name) >= 1, "{} must be at least 1, got {}", name, getattr(self, name))
        fits = 1 <= self.num_joint < vision.num_layers
        require(op, fits, "num_joint must be from 1 to below {} layers, got {}", vision.num_layers, self.num_joint)
        fits = vision.has_class_token and vision.has_patch_bias and vision.has_final_norm
        fits &= not (vision.num_registers or vision.has_norm_pre or vision.has_swiglu or vision.has_mask_token)
        require(op, fits, "vision must have a class token, biases and a final norm, and no more, got {}", vision)
        kinds = vision.relative_positions in ("none", "layers") and vision.positions in ("none", "learned")
        what = "vision must have learned positions, relative ones of each layer or both, got {} and {}"
        found = vision.positions, vision.relative_positions
        require(op, kinds and found != ("none", "none"), what, *found)
        fits = vision.relative_positions == "none" or self.num_text <= self.num_distances
        require(op, fits, "num_text must be at most num_distances {}, got {}", self.num_distances, self.num_text)

    @property
    def first_joint(self) -> int:
        """The first block with an expert of both."""
        return self.vision.num_layers - self.num_joint


class Features(NamedTuple):
    """Unit vectors [B, D] of images and texts, each by its own experts alone and by those of both in the upper blocks,
    and the two scales, [1]."""

    image: Tensor
    text: Tensor
    image_joint: Tensor
    text_joint: Tensor
    scale: Tensor
    scale_joint: Tensor


class TextEmbedding(nn.Module):
    """Words, their places where these are learned, BERT's first type, LN, and what makes them words."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        width = config.vision.width
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        has_places = config.vision.positions == "learned"
        self.position_embedding = nn.Parameter(torch.zeros(config.num_text, width)) if has_places else None
        self.type_embedding = nn.Parameter(torch.zeros(2, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.vision.drop_path)
        self.modality = nn.Parameter(torch.zeros(1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] to [B, T, D]."""
        x = self.word_embedding(tokens) + self.type_embedding[0]
        if self.position_embedding is not None:
            most = len(self.position_embedding)
            require("VLMo", tokens.shape[1] <= most, "tokens must be at most {} a text, got {}", most, tokens.shape[1])
            x = x + self.position_embedding[: tokens.shape[1]]
        return self.dropout(self.norm(x)) + self.modality


class ImageEmbedding(PatchEmbedding):
    """Patches with a class token, and what makes them an image's."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.modality = nn.Parameter(torch.zeros(1, config.width))

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        return self.embed(images, masked=masked) + self.modality


class VLMo(nn.Module):
    """`text_embed`, `image_embed`, the `blocks`, and heads: of contrast, matching and hidden words, or of answers."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        vision, width = config.vision, config.vision.width
        self.image_embed = ImageEmbedding(vision)
        self.text_embed = TextEmbedding(config)
        num = vision.num_layers
        self.relative = None
        if vision.relative_positions == "layers":
            side = vision.image_size // vision.patch_size
            self.relative = MultiwayPositions(side, config.num_distances, num, vision.num_heads)
        shares = [vision.drop_path * (1.0 if vision.drop_path_uniform else i / max(1, num - 1)) for i in range(num)]
        options: Any = {name: getattr(vision, name) for name in ("activation", "norm_eps", "layer_scale", "qkv_bias")}
        self.blocks = nn.ModuleList(
            MultiwayBlock(
                width,
                vision.num_heads,
                vision.mlp_dim,
                num_experts=3 if i >= config.first_joint else 2,
                drop_path=share,
                **options,
            )
            for i, share in enumerate(shares)
        )
        self.norm = nn.LayerNorm(width, eps=vision.norm_eps)
        self.pooler = Linear(width, width)
        if config.num_answers:
            self.answer_head = AnswerHead(width, config.num_answers)
        else:
            self.text_head = TextHead(nn.Embedding(config.vocab_size, width))
            self.match_head = Linear(width, 2)
            self.image_proj, self.text_proj, self.image_joint_proj, self.text_joint_proj = (
                Linear(width, width, bias=False) for _ in range(4)
            )
            self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
            self.logit_scale_joint = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As published: normal numbers, biases 0."""
        drawn = [self.image_embed.class_embedding, self.image_embed.position_embedding, self.image_embed.modality]
        drawn += [self.text_embed.position_embedding, self.text_embed.type_embedding, self.text_embed.modality]
        if not self.config.num_answers:
            drawn.append(self.text_head.weight)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                drawn.append(module.weight)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for x in drawn:
            if x is not None:
                x.normal_(std=self.config.init_std)
        self.text_embed.word_embedding.weight[self.config.pad_token_id] = 0

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """A method by its name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    # the transformer

    def _masks(self, num_words: int, num_text: Tensor | None, num_patches: int) -> list[masks.Mask | None]:
        """Of each block: of `num_words` words a row the first `num_text` [B] are seen, all where it is None."""
        total, seen = num_words + num_patches, None
        if num_text is not None:
            places = torch.arange(total, device=num_text.device)
            seen = (places < num_text[:, None]) | (places >= num_words)  # [B, T]
        if self.relative is None:
            return [None if seen is None else masks.key_padding(seen, total)] * len(self.blocks)
        bias = self.relative(num_words, num_patches > 0)  # [L, H, T, T]
        each = [x[None] if seen is None else x.masked_fill(~seen[:, None, None], -torch.inf) for x in bias]
        return [masks.Dense(x) for x in each]

    def _run(
        self, x: Tensor, num_words: int, through: list[masks.Mask | None], blocks: range, *, is_joint: bool
    ) -> Tensor:
        """[B, T, D] through some of the blocks, whose masks are `through`: each token by the expert of its modality, or
        in the upper blocks by that of both."""
        recompute, rest = self.activation_checkpointing and torch.is_grad_enabled(), x.shape[1] - num_words
        for i in blocks:
            is_upper = i >= self.config.first_joint
            own = (num_words, rest, 0) if is_upper else (num_words, rest)
            inputs = x, (0, 0, x.shape[1]) if is_upper and is_joint else own, through[i]
            block = self.blocks[i]
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return x

    def image_states(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] by the experts of images to [B, 1 + P, D]."""
        x = self.image_embed(images)
        through = self._masks(0, None, x.shape[1])
        return self.norm(self._run(x, 0, through, range(len(self.blocks)), is_joint=False))

    def text_states(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """int64 [B, T], padded on the right, of which `num_text` [B] count, by the experts of texts to [B, T, D]."""
        x, length = self.text_embed(tokens), tokens.shape[1]
        through = self._masks(length, num_text, 0)
        return self.norm(self._run(x, length, through, range(len(self.blocks)), is_joint=False))

    def states(self, embedded: Tensor, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Embedded images [B, 1 + P, D] and texts, see `text_states`, together: [B, T + 1 + P, D], words first."""
        length = tokens.shape[1]
        x = torch.cat([self.text_embed(tokens), embedded], 1)
        through = self._masks(length, num_text, embedded.shape[1])
        return self.norm(self._run(x, length, through, range(len(self.blocks)), is_joint=True))

    def _class_states(self, x: Tensor, num_text: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of one modality's tokens the class token's state by its own experts, and by those of both in the upper
        blocks, each [B, D]."""
        num_words = 0 if num_text is None else x.shape[1]
        through, first = self._masks(num_words, num_text, x.shape[1] - num_words), self.config.first_joint
        lower = self._run(x, num_words, through, range(first), is_joint=False)
        upper = range(first, len(self.blocks))
        own, both = (self._run(lower, num_words, through, upper, is_joint=joint)[:, 0] for joint in (False, True))
        return self.norm(own), self.norm(both)

    # heads

    def pairs(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> Features:
        """Of images [B, 3, S, S] and texts, see `text_states`."""
        image, image_joint = self._class_states(self.image_embed(images), None)
        text, text_joint = self._class_states(self.text_embed(tokens), num_text)
        projections = self.image_proj, self.text_proj, self.image_joint_proj, self.text_joint_proj
        states = image, text, image_joint, text_joint
        features = [_unit(proj(x)) for proj, x in zip(projections, states, strict=True)]
        scales = (x.exp().to(features[0].dtype) for x in (self.logit_scale, self.logit_scale_joint))
        return Features(*features, *scales)

    def embed_image(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D]."""
        return _unit(self.image_proj(self.image_states(images)[:, 0]))

    def embed_text(self, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Unit vectors [B, D] of texts, see `text_states`."""
        return _unit(self.text_proj(self.text_states(tokens, num_text)[:, 0]))

    def _pooled(self, embedded: Tensor, tokens: Tensor, num_text: Tensor) -> Tensor:
        return torch.tanh(self.pooler(self.states(embedded, tokens, num_text)[:, 0]))

    def match(self, images: Tensor, index: Tensor, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Logits of no and yes [R, 2] of R texts with images `index` [R] of [M, 3, S, S]."""
        embedded = self.image_embed(images).index_select(0, index)
        return self.match_head(self._pooled(embedded, tokens, num_text))

    def _word_states(self, images: Tensor | None, tokens: Tensor, num_text: Tensor) -> Tensor:
        if images is None:
            return self.text_states(tokens, num_text)
        return self.states(self.image_embed(images), tokens, num_text)[:, : tokens.shape[1]]

    def words(self, images: Tensor | None, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Logits of words [B, T, V]; without images by the experts of texts alone."""
        return self.text_head(self._word_states(images, tokens, num_text))

    def word_loss(self, images: Tensor | None, tokens: Tensor, num_text: Tensor, labels: Tensor) -> Tensor:
        """The sum [] of the cross-entropies of `words` with labels int64 [B, T], -100 where there is none."""
        return self.text_head(self._word_states(images, tokens, num_text), labels)

    def answer(self, images: Tensor, tokens: Tensor, num_text: Tensor) -> Tensor:
        """Logits [B, A] of answers to questions about images [B, 3, S, S]."""
        return self.answer_head(self._pooled(self.image_embed(images), tokens, num_text))

    def image_tower(self) -> Tower:
        """The patches and the experts of images as a ViT of their own, which gives `image_states`."""
        vision, own = self.config.vision, self.state_dict()
        with torch.device("meta"):
            tower = ViT(vision)
        found, tables = {}, self.relative and own["relative.table"].chunk(vision.num_layers, 1)
        for name in tower.state_dict():
            part, _, rest = name.partition(".")
            if part == "transformer":
                _, i, of_block = rest.split(".", 2)
                for ours, theirs in (("norms", "norm2"), ("mlps", "mlp")):
                    if of_block.startswith(f"{theirs}."):
                        of_block = f"{ours}.{IMAGE}{of_block.removeprefix(theirs)}"
                if of_block == "relative.table":
                    assert tables is not None
                    found[name] = tables[int(i)][: (2 * (vision.image_size // vision.patch_size) - 1) ** 2 + 3].clone()
                else:
                    found[name] = own[f"blocks.{i}.{of_block}"]
            elif part == "norm_post":
                found[name] = own[f"norm.{rest}"]
            else:
                found[name] = own[f"image_embed.{name}"]
        modality = own["image_embed.modality"][0]
        for name in ("class_embedding", "patch_embed.bias"):
            found[name] = found[name] + modality
        return Tower(vision, found)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
