"""Matrix products of tiles on a CPU, by the fastest library that torch carries."""

import torch
from torch import Tensor

# whether products of bfloat16 run at more than float32's speed
FAST_BFLOAT16: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def matmul_nt(x: Tensor, y: Tensor) -> Tensor:
    """`x y^T` for float32 or float64 `x [M, K]` and `y [N, K]` of any strides, into a new tensor.

    In float32 oneDNN's AVX-512 product is called by name: `torch.mm` goes to MKL, which on AMD's processors
    runs at half of its speed (Zen 5, two cores: 210 against 440 GFLOP/s).
    """
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and x.numel() and y.numel():
        return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return torch.mm(x, y.T)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """`x y` for `x [M, K]` and `y [K, N]` of any strides, as `matmul_nt`; of bfloat16, rounded to it."""
    return torch.mm(x, y) if x.dtype == torch.bfloat16 else matmul_nt(x, y.T)
