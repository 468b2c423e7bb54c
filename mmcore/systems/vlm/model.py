"""An image-text-to-text model of transformers, whose loss comes without logits."""

from typing import Any

import torch
from torch import Tensor, nn

from mmcore.labels import IGNORED
from mmcore.nn import quicken
from mmcore.parts.adapters import Lora, add_adapters, is_adapter, merge_adapters
from mmcore.parts.decoding import in_step
from mmcore.parts.language import LanguageHead


class ReadingModel(nn.Module):
    """`body`, a model of transformers with `model` and an output layer; all of it learns, or adapters of its language
    model alone."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        quicken(body)
        self.body: Any = body
        self.language_head = LanguageHead(body.get_output_embeddings())
        self._adapters: tuple[Any, ...] = ()

    def forward(self, task: str, *inputs: Any, **options: Any) -> Any:
        """`loss` or `generate` by name: under ZeRO-3 parameters are whole only inside a forward."""
        return getattr(self, task)(*inputs, **options)

    def loss(self, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the labels [B, T], summed, and how many are learned; `inputs` are the model's own, rows
        padded on the right."""
        states = self.body.model(**inputs, use_cache=False).last_hidden_state
        labels = labels[:, 1:]
        return self.language_head(states[:, :-1], labels), (labels != IGNORED).sum()

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        """Token ids behind prompts that are padded on the left, by transformers' `generate`."""
        made = self.body.generate(**inputs, **(in_step(self.body) | options))
        return made[:, inputs["input_ids"].shape[1] :]

    def freeze(self, patterns: Any) -> None:
        """Weights whose names a pattern, a compiled one, is found in do not learn."""
        for name, parameter in self.body.named_parameters():
            if any(pattern.search(name) for pattern in patterns):
                parameter.requires_grad_(False)

    def add_adapters(self, lora: Lora) -> None:
        """Puts adapters beside the language model's linear layers, which learn in place of all weights."""
        self.body.requires_grad_(False)
        # in a tuple, so that it is no part of this module
        self._adapters = (add_adapters(self.body.get_decoder(), lora),)
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(is_adapter(name))

    def merge_adapters(self) -> None:
        """Adds what the adapters learned to the weights, and takes them away; nothing where there are none."""
        for tuner in self._adapters:
            merge_adapters(self.body.get_decoder(), tuner)
        self._adapters = ()
