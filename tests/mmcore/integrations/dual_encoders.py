"""Small dual encoders of transformers with random weights, and a batch of theirs."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TEXT = SMALL | {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39}
VISION = SMALL | {"image_size": 8, "patch_size": 4}
# XLM-RoBERTa's positions begin behind its padding
PADDED = TEXT | {"max_position_embeddings": 12, "project_dim": 16, "pooler_fn": "cls"}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIP", TEXT), "MetaCLIP 2": ("MetaClip2", TEXT), "Chinese-CLIP": ("ChineseCLIP", TEXT),
    "AltCLIP": ("AltCLIP", PADDED), "BLIP": ("Blip", TEXT | {"encoder_hidden_size": 32}),
    "SigLIP": ("Siglip", TEXT | {"projection_size": 32}),
}  # fmt: skip
"""What their classes' names begin with, and their texts."""


def make(name: str) -> Any:
    """The model, whose text and image features spread enough for a loss to depend on them."""
    prefix, text = MODELS[name]
    options = {} if name == "SigLIP" else {"projection_dim": 16}
    torch.manual_seed(0)
    config = getattr(hf, f"{prefix}Config")(text_config=text, vision_config=VISION, **options)
    model = getattr(hf, f"{prefix}Model")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
        model.logit_scale.fill_(1.5)
        if name == "SigLIP":
            model.logit_bias.fill_(-2.0)
    return model.double().train()


def batch(num: int) -> dict[str, Tensor]:
    """The global batch, the same on every rank; each text ends."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 39, (num, 8), generator=generator)
    tokens[:, -1] = 39
    images = torch.randn(num, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"input_ids": tokens, "pixel_values": images, "attention_mask": torch.ones_like(tokens)}
