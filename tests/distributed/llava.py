"""A tiny LLaVA-NeXT and its batches, whose last rank has words alone."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.vit import VisionConfig
from mmcore.systems.llava.loader import ChatPart
from mmcore.systems.llava.model import Llava, LlavaConfig, Lora, Trainable
from mmcore.systems.llava.runs import load_trained

B, LENGTH, VOCAB = 4, 32, 40
IMAGE = (20, 50)


def model(trainable: Trainable, *, tied: bool = False, lora: bool = False) -> Llava:
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, width=32, num_layers=2, num_heads=2, mlp_dim=64)
    language: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    config = LlavaConfig(vision, grid_pinpoints=((16, 32), (32, 16)))
    found = Llava(config, language, trainable=trainable)
    if lora:
        load_trained(found, Lora(4, 8), {n: x for n, x in found.state_dict().items() if "language_" not in n})
    return found


def batch(step: int, ranks: range, config: LlavaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, views and sizes of a share of two ranks: the first row of rank 0 has two images."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, VOCAB, (B, LENGTH), generator=generator)
    num_tokens, num_views = config.num_image_tokens(IMAGE), config.num_views(IMAGE)
    images = torch.randn(3 * num_views, 3, 16, 16, generator=generator)
    for row, start in ((0, 1), (0, 2 + num_tokens), (1, 0)):
        tokens[row, start : start + num_tokens] = IMAGE_TOKEN
    rows = slice(ranks.start * B // 2, ranks.stop * B // 2)
    num_images = 3 if 0 in ranks else 0
    labels = tokens.masked_fill(tokens == IMAGE_TOKEN, -100)
    sizes = torch.tensor([IMAGE] * num_images, dtype=torch.int64).view(-1, 2)
    return tokens[rows], labels[rows], images[: num_images * num_views], sizes


def parts(step: int, ranks: range, config: LlavaConfig, accum: int) -> list[ChatPart]:
    """The same in parts of as many rows each."""
    tokens, labels, images, sizes = batch(step, ranks, config)
    num_views, found = config.num_views(IMAGE), []
    for rows in torch.arange(len(tokens)).chunk(accum):
        first, last = (
            int((tokens[:end] == IMAGE_TOKEN).sum()) // config.num_image_tokens(IMAGE)
            for end in (rows[0], rows[-1] + 1)
        )
        views = images[first * num_views : last * num_views]
        found.append(ChatPart(tokens[rows], labels[rows], views, sizes[first:last], None))
    return found
