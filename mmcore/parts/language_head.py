"""The last layer of a language model and the loss behind it."""

from typing import Any

import torch
from torch import Tensor, nn

from mmcore.ops import linear_cross_entropy, require


class LanguageHead(nn.Module):
    """A language model's last layer and the cross-entropy behind it; its weights are that layer's own, which ZeRO-3
    gathers for either."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """The sum over [B, T, D] states whose int64 [B, T] labels are not -100: []."""
        states, labels = states.flatten(0, 1), labels.flatten()
        return linear_cross_entropy(states, self.weight, labels, bias=self.bias, reduction="sum")


@torch.no_grad()
def check_head(op: str, model: Any) -> None:
    """Raise a ValueError unless logits are W x + b of the last states: some models scale or cap them, which the fused
    loss does not."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    model.eval()
    head, states = model.get_output_embeddings(), model.base_model(input_ids=tokens).last_hidden_state
    expected = model(input_ids=tokens).logits
    same = torch.allclose(head(states).float(), expected.float(), rtol=1e-3, atol=1e-3)
    require(
        op, same, "model must have logits W x + b of its last states, got others from a {}", model.config.model_type
    )
