"""A batch of LLaVA-1.5's second stage: conversations of its mix, packed into rows and padded.

The lengths are synthetic. They are drawn part by part after what is published of the mix of 665k conversations:
- how many conversations each part has: haotian-liu/LLaVA, issue 702;
- rounds of one: questions an image as the datasets count them, and the appendix of arXiv:2310.03744 (A-OKVQA and
  TextCaps one, Visual Genome ten, RefCOCO fewer than ten, ShareGPT cut at 2048 tokens);
- tokens of a round: of LLaVA's own parts, what the sizes of their files (its docs/Data.md) leave beside the JSON, at
  four bytes a token; of ShareGPT, what the 1.03 GB of the whole mix leave for it; answers elsewhere as
  arXiv:2405.02246 counts them, questions, format prompts and boxes as they are usually worded.
The spread around these means is ours: Poisson for rounds, a gamma distribution for texts.

The padded batch is one of those that LLaVA's own order makes, by modality and length, of its 128 conversations a step:
of the batches with images, 15 of 16, that whose shares of padding and of learned tokens are nearest to those of all
batches. The packed rows hold the same conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from mmcore.data.grouping import group_by_modality_length
from mmcore.data.text.chat_batches import ChatBatch, PackedBatch, collate, pack
from mmcore.data.text.templates import ChatSample
from mmcore.labels import IGNORED, IMAGE_TOKEN
from mmcore.parts.vit import VisionConfig

# what Vicuna's template writes before a conversation, and around a round of it
SYSTEM_TOKENS, ROUND_TOKENS = 35, 9
GLOBAL_BATCH = 128


class Part(NamedTuple):
    """Of the mix: how many conversations, and what one has on average."""

    name: str
    conversations: int
    rounds: float
    asked: int
    answered: int
    has_image: bool = True


MIX = (
    Part("LLaVA conversation", 57_000, 4.4, 14, 70),
    Part("LLaVA detail", 23_000, 1, 16, 146),
    Part("LLaVA complex reasoning", 77_712, 1, 20, 178),
    Part("ShareGPT", 40_688, 4, 40, 160, has_image=False),
    Part("VQAv2", 82_783, 5.4, 10, 2),
    Part("GQA", 72_140, 13.1, 11, 2),
    Part("OKVQA", 8_998, 1, 20, 2),
    Part("OCR-VQA", 80_000, 4.8, 10, 7),
    Part("A-OKVQA", 66_160, 1, 50, 1),
    Part("TextCaps", 21_953, 1, 60, 17),
    Part("RefCOCO", 48_447, 5.9, 28, 15),
    Part("Visual Genome", 86_417, 10, 28, 15),
)


@dataclass(frozen=True)
class Shape:
    """A model and the batch that it is given.

    Attributes:
        scale: by which an image's features, the texts and a row are shorter than LLaVA's 576, the mix's and 2048.
        batch_size: conversations.
    """

    vision: VisionConfig
    text: LlamaConfig
    scale: int
    batch_size: int
    dtype: torch.dtype

    @property
    def max_length(self) -> int:
        return 2048 // self.scale

    @property
    def name(self) -> str:
        return f"B{self.batch_size}-T{self.max_length}-P{self.vision.num_patches}-V{self.text.vocab_size}"


def llama(width: int, num_layers: int, kv_width: int, vocab_size: int, **settings: Any) -> LlamaConfig:
    """Llama 3.2's proportions: heads of 64, a hidden layer four times as wide."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=kv_width // 64,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        **settings,
    )


# Llama 3.2's 1B behind CLIP's ViT-L/14 at 336 pixels, without the layer that LLaVA leaves out
GPU = Shape(
    VisionConfig(336, 14, 1024, 23, 16, 4096, "quick_gelu"),
    llama(2048, 16, 512, 128_256, tie_word_embeddings=True, rope_theta=500_000.0),
    scale=1,
    batch_size=8,
    dtype=torch.bfloat16,
)
# all lengths are a quarter; the vocabulary has the share of the 1B's products that it has there, a fifth
CPU = Shape(
    VisionConfig(192, 16, 192, 4, 3, 768, "quick_gelu"),
    llama(384, 4, 128, 6_144),
    scale=4,
    batch_size=4,
    dtype=torch.float32,
)


class Talk(NamedTuple):
    """A conversation's lengths: of what is asked and answered, the template's marks included."""

    has_image: bool
    rounds: list[tuple[int, int]]

    def length(self, shape: Shape) -> int:
        text = SYSTEM_TOKENS // shape.scale + sum(map(sum, self.rounds))
        return min(shape.max_length, text + (shape.vision.num_patches if self.has_image else 0))


def draw(shape: Shape, number: int, rng: np.random.Generator) -> list[Talk]:
    """Conversations of the mix."""
    counts = np.array([part.conversations for part in MIX])

    def text(mean: float) -> int:
        return max(1, round(rng.gamma(4, mean / 4) / shape.scale))

    talks = []
    for i in rng.choice(len(MIX), number, p=counts / counts.sum()):
        part = MIX[i]
        num_rounds = 1 + rng.poisson(part.rounds - 1)
        rounds = [(text(part.asked + ROUND_TOKENS), text(part.answered + 1)) for _ in range(num_rounds)]
        talks.append(Talk(part.has_image, rounds))
    return talks


def padded_batches(shape: Shape, talks: Sequence[Talk]) -> list[list[Talk]]:
    """Those that LLaVA's order makes for the ranks of its global batch, without what is left over."""
    lengths, size = [talk.length(shape) for talk in talks], shape.batch_size
    world_size = GLOBAL_BATCH // size
    generator = torch.Generator().manual_seed(0)
    order = group_by_modality_length(lengths, [t.has_image for t in talks], size, world_size, generator)
    batches = [[talks[i] for i in order[b : b + size]] for b in range(0, len(order) - size + 1, size)]
    return [batch for batch in batches if len({talk.has_image for talk in batch}) == 1]


def shares(shape: Shape, batches: Sequence[Sequence[Talk]]) -> np.ndarray:
    """Of padding in padded batches, and of learned tokens in the rest."""
    lengths = [[talk.length(shape) for talk in batch] for batch in batches]
    num_tokens = sum(map(sum, lengths))
    learned = sum(answered for batch in batches for talk in batch for _, answered in talk.rounds)
    padded = sum(len(batch) * max(batch) for batch in lengths)
    return np.array([1 - num_tokens / padded, learned / num_tokens])


def typical_batch(shape: Shape) -> list[Talk]:
    """With images, and with about the shares of all batches of some steps."""
    batches = padded_batches(shape, draw(shape, 32 * GLOBAL_BATCH, np.random.default_rng(0)))
    wanted = shares(shape, batches)
    return min(
        (batch for batch in batches if batch[0].has_image),
        key=lambda batch: np.abs(shares(shape, [batch]) - wanted).sum(),
    )


class Batch(NamedTuple):
    """The same conversations, packed and padded, and the images of each."""

    packed: PackedBatch
    packed_images: Tensor
    padded: ChatBatch
    padded_images: Tensor

    @property
    def num_tokens(self) -> int:
        """Padding not counted."""
        return int(self.padded.num_text.sum())

    @property
    def num_learned(self) -> int:
        return int((self.padded.labels[:, 1:] != IGNORED).sum())


def batch(shape: Shape, device: torch.device) -> Batch:
    """The typical batch with tokens and pixels of noise."""
    generator = torch.Generator().manual_seed(1)
    samples = [sample(shape, talk, generator) for talk in typical_batch(shape)]
    side = shape.vision.image_size
    images = torch.randn(len(samples), 3, side, side, generator=generator).to(device, shape.dtype)
    packed, padded = pack(samples, shape.max_length, 0), collate(samples, 0)
    order = [i for row in packed.samples for i in row]
    packed = packed._replace(**{n: getattr(packed, n).to(device) for n in ("tokens", "labels", "position_ids")})
    return Batch(packed, images[order], ChatBatch(*(x.to(device) for x in padded)), images)


def sample(shape: Shape, talk: Talk, generator: torch.Generator) -> ChatSample:
    """Tokens of a conversation with an image: what is answered is learned."""
    image = torch.full((shape.vision.num_patches,), IMAGE_TOKEN)
    texts = [(SYSTEM_TOKENS // shape.scale, False)]
    for asked, answered in talk.rounds:
        texts += [(asked, False), (answered, True)]
    # the last of the vocabulary is transformers' place of an image
    words = [torch.randint(3, shape.text.vocab_size - 1, (n,), generator=generator) for n, _ in texts]
    learned = [w if is_learned else torch.full_like(w, IGNORED) for w, (_, is_learned) in zip(words, texts)]
    tokens = torch.cat([words[0], image, *words[1:]])[: shape.max_length]
    labels = torch.cat([learned[0], torch.full_like(image, IGNORED), *learned[1:]])[: shape.max_length]
    return ChatSample(tokens, labels)
