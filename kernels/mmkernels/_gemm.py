"""Matrix products of tiles on a CPU, each by the way that `_products` has chosen for this machine."""

import torch
from torch import Tensor

from mmkernels._numerics import widen
from mmkernels._products import CHOICES, product_bfloat16, product_onednn

CALLS_ONEDNN: bool = CHOICES["float32"].way == "onednn"
"""Whether oneDNN's products of float32 are called by name: `torch.mm` goes to MKL."""
LOW: str = CHOICES["bfloat16"].way
"""How bfloat16 operands are multiplied on a CPU."""


def is_low(x: Tensor) -> bool:
    """Whether products take `x` as it is, in bfloat16, and give float32."""
    return x.dtype == torch.bfloat16 and LOW != "widened" and x.is_cpu


def factor(x: Tensor) -> Tensor:
    """`x` as `matmul_nt` takes it: bfloat16 where that is multiplied faster than float32, else widened; contiguous."""
    return x.contiguous() if is_low(x) else widen(x)


def low_like(x: Tensor, like: Tensor) -> Tensor:
    """`x` to be multiplied with `like`, which is what `factor` gave: rounded to bfloat16 where that is."""
    return x.to(like.dtype)


def matmul_nt(x: Tensor, y: Tensor) -> Tensor:
    """`x y^T` for `x [M, K]` and `y [N, K]` of any strides, into a new tensor: float32 or float64 as they are, or
    bfloat16 on a CPU, summed and given in float32."""
    if is_low(x):
        return product_bfloat16(LOW, _dense(x), _dense(y), torch.empty(len(x), len(y)))
    if CALLS_ONEDNN and x.dtype == torch.float32 and x.numel() and y.numel():
        return product_onednn(x, y)
    return torch.mm(x, y.T)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """`x y` for `x [M, K]` and `y [K, N]` of any strides, as `matmul_nt`."""
    return matmul_nt(x, y.T)


def add_matmul(out: Tensor, x: Tensor, y: Tensor, add: bool = True) -> None:
    """`out += x y`, or without `add` `out = x y`; `out` in the dtype that `matmul` gives, with unit column stride."""
    if is_low(x):
        product_bfloat16(LOW, _dense(x), _dense(y.T), out, add)
    elif add:
        out += matmul(x, y)
    else:
        out.copy_(matmul(x, y))


def _dense(x: Tensor) -> Tensor:
    """The kernel reads rows or columns that are dense: others would be read one entry at a time."""
    return x if 1 in x.stride() else x.contiguous()
