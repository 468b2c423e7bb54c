"""The feed-forward of a transformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn.linear import Linear


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, width: int, mlp_dim: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.fc1 = Linear(width, mlp_dim, bias=bias)
        self.fc2 = Linear(mlp_dim, width, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
