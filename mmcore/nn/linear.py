"""A linear layer whose float32 products on a CPU go to the fastest library that torch carries; an MLP of two."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.ops import CALLS_ONEDNN, is_transforming, matmul_nt

# Products below this, of rows, inputs and outputs, gain nothing.
MIN_PRODUCT = 2**23


class Linear(nn.Linear):
    """`x W^T + b`, torch.nn.Linear's in all but the speed of float32 on a CPU.

    There, where that is the faster library on this machine (`python -m bench facts`), the three products of a training
    step are oneDNN's: torch sends them to MKL, which may run at half of its rate. Elsewhere, and under autocast,
    torch.compile, torch.func or forward-mode AD, it is torch.nn.Linear.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] to [..., F]."""
        is_small = input.numel() * self.out_features < MIN_PRODUCT
        if torch.compiler.is_compiling() or is_small or not _is_plain_float32(input, self.weight):
            return super().forward(input)
        # by its transpose, as torch has it: the gradients of bias and weight then come in one order on either path, by
        # which ranks whose batches differ in size agree on what they reduce together
        return _Product.apply(input, self.weight.T, self.bias)


def quicken(module: nn.Module) -> None:
    """Makes every torch.nn.Linear of a module that others wrote a `Linear`; weights, names and hooks stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


def _is_plain_float32(x: Tensor, weight: Tensor) -> bool:
    return (
        CALLS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not is_transforming()
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        weight = transposed.T
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows, dy_rows = x.flatten(0, -2), dy.flatten(0, -2)
        product = F.linear if torch.is_grad_enabled() else matmul_nt  # create_graph asks for what has a derivative
        dx = product(dy_rows, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = product(dy_rows.T, rows.T).T if ctx.needs_input_grad[1] else None
        db = dy_rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """fc2(activation(fc1(x))), or with `inner_norm`, an epsilon, fc2(LN(activation(fc1(x)))) (Sub-LN,
    arXiv:2210.06423)."""

    def __init__(
        self, width: int, mlp_dim: int, *, activation: str = "gelu", bias: bool = True, inner_norm: float | None = None
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.fc1 = Linear(width, mlp_dim, bias=bias)
        self.fc2 = Linear(mlp_dim, width, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.inner_norm = None if inner_norm is None else nn.LayerNorm(mlp_dim, eps=inner_norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.fc1(x))
        return self.fc2(x if self.inner_norm is None else self.inner_norm(x))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), a and b the halves of w12(x), `mlp_dim` wide each (arXiv:2002.05202)."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * mlp_dim)
        self.w3 = Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)
