"""Low-rank adapters beside a language model's linear layers (LoRA, arXiv:2106.09685), by peft."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmcore.ops import require

LORA_DROPOUT = 0.05
"""Before the adapters, as LLaVA's recipes have it."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside the language model's linear layers (LoRA, arXiv:2106.09685): W x + alpha / rank B A
    x."""

    rank: int  # rows of A, at least 1
    alpha: int  # above 0
    dropout: float = 0.0  # of x before A, in [0, 1)

    def __post_init__(self) -> None:
        require("Lora", self.rank >= 1, "rank must be at least 1, got {}", self.rank)
        require("Lora", self.alpha > 0, "alpha must be above 0, got {}", self.alpha)
        require("Lora", 0 <= self.dropout < 1, "dropout must be in [0, 1), got {}", self.dropout)


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is an adapter's."""
    return ".lora_" in name


def add_adapters(language: Any, lora: Lora) -> Any:
    """Puts an adapter of float32, `...lora_A.default.weight`, beside each linear layer of a language model but the
    head, which adds 0 until it has learned. Returns what `merge_adapters` takes."""
    peft = importlib.import_module("peft")  # takes seconds
    head = language.get_output_embeddings()
    names = [n for n, x in language.named_modules() if isinstance(x, nn.Linear) and x is not head]
    options = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    config = peft.LoraConfig(target_modules=names, bias="none", **options)
    tuner = peft.LoraModel(language, config, "default")
    for name, parameter in language.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    return tuner


@torch.no_grad()
def merge_adapters(language: Any, tuner: Any) -> None:
    """Adds what the adapters learned to the layers' own weights, in float32 at least, and takes the adapters away."""
    stored = next(p.dtype for name, p in language.named_parameters() if not is_adapter(name))
    language.to(torch.promote_types(stored, torch.float32))
    tuner.merge_and_unload(progressbar=False)
    language.to(stored)
