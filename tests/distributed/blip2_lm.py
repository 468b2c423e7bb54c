"""A tiny BLIP-2 of stage 2 and its batches, half of which has no picture."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmcore.data.text.prompts import Prompted
from mmcore.parts.vit import VisionConfig
from mmcore.systems.blip2.lm import BLIP2LM
from mmcore.systems.blip2.qformer import QFormerConfig

B, LENGTH, VOCAB = 4, 7, 40


def model(language_dtype: torch.dtype = torch.float32) -> BLIP2LM:
    """Without dropout, so that rows of a batch do not depend on their rank."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, width=32, num_layers=2, num_heads=2, mlp_dim=64)
    qformer = QFormerConfig(
        4, 24, 2, 2, 48, image_width=32, has_text=False, dropout=0.0, attention_dropout=0.0
    )
    language: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    return BLIP2LM(vision, qformer, language.to(language_dtype))


def batch(step: int) -> tuple[Tensor, Prompted, Tensor]:
    """Of all ranks; the second half of the rows has no picture, so the last rank has none at all."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(B, 3, 16, 16, generator=generator)
    tokens = torch.randint(3, VOCAB, (B, LENGTH), generator=generator)
    num_prompt, num_text = torch.tensor([1, 2, 1, 3]), torch.tensor([7, 5, 6, 4])
    return images, Prompted(tokens, num_prompt, num_text, None), torch.arange(B) < B // 2
