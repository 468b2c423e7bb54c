"""Matrix products of tiles on a CPU, by the fastest library that torch carries."""

from pathlib import Path

import torch
from torch import Tensor

# whether products of bfloat16 run at more than float32's speed
FAST_BFLOAT16: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
CPU_INFO = Path("/proc/cpuinfo")


def _is_of_intel() -> bool:
    return CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text()


# Whether oneDNN's products of float32 are called by name: torch.mm goes to MKL, which takes AVX-512 on Intel's
# processors alone. On AMD's that have AVX-512 MKL runs at half of oneDNN's speed; without AVX-512, and on Intel's
# processors, MKL is ahead.
CALLS_ONEDNN: bool = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_of_intel()
)


def matmul_nt(x: Tensor, y: Tensor) -> Tensor:
    """`x y^T` for float32 or float64 `x [M, K]` and `y [N, K]` of any strides, into a new tensor."""
    if CALLS_ONEDNN and x.dtype == torch.float32 and x.numel() and y.numel():
        return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return torch.mm(x, y.T)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """`x y` for `x [M, K]` and `y [K, N]` of any strides, as `matmul_nt`; of bfloat16, rounded to it."""
    return torch.mm(x, y) if x.dtype == torch.bfloat16 else matmul_nt(x, y.T)
