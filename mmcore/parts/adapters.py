"""Low-rank adapters beside a language model's linear layers (LoRA, arXiv:2106.09685), by peft."""

import torch
from peft import LoraConfig, LoraModel
from torch import nn

from mmcore.systems.llava.model import Llava, Lora, is_adapter


def add_adapters(model: Llava, lora: Lora) -> LoraModel:
    """Puts an adapter, which learns, beside each linear layer of the language model but the head; what it adds is 0
    until it has learned.

    Args:
        model: its language model stays the same object, with adapters of float32 named `...lora_A.default.weight`.
        lora: their shape.

    Returns:
        What `merge_adapters` takes.
    """
    language = model.language_model
    head = language.get_output_embeddings()
    names = [n for n, x in language.named_modules() if isinstance(x, nn.Linear) and x is not head]
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none"
    )
    tuner = LoraModel(language, config, "default")
    for name, parameter in language.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    model.set_trainable(model.trainable)
    return tuner


@torch.no_grad()
def merge_adapters(tuner: LoraModel) -> None:
    """Adds what the adapters learned to the layers' own weights, and takes the adapters away."""
    tuner.merge_and_unload(progressbar=False)
