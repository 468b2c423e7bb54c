"""Launch configurations of the contrastive kernels: a pure function of dtype and architecture, so all ranks
agree.

GPU: none; compiled ahead of time for each architecture on 2026-11-20, not yet timed.
"""

from dataclasses import dataclass

import torch

# Programs that share the rows; each keeps column sums of its own, [programs, N], so no atomics are needed.
MAX_PROGRAMS = 132
# Pass 2 holds one [chunk, N] buffer of dL/dS: 256 MiB of it, but never fewer rows than keep a GEMM busy.
CHUNK_BYTES = 256 << 20
MIN_CHUNK, MAX_CHUNK = 1024, 4096


@dataclass(frozen=True)
class Launch:
    """Tile sizes (a power of two each, at least 16), warps and pipeline stages of a kernel."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


# (kernel, bytes an element, architecture): sm_80 serves 8.x, sm_90 serves 9.x, sm_100 serves 10.x and later.
TABLE: dict[tuple[str, int, int], Launch] = {
    ("fwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd", 2, 100): Launch(64, 128, 64, 8, 3),
    ("fwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 100): Launch(128, 64, 16, 8, 3),
    ("bwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("bwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("bwd", 2, 100): Launch(128, 64, 64, 8, 3),
    ("bwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("bwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("bwd", 4, 100): Launch(128, 64, 16, 8, 3),
}
# The interpreter's: small, so that small tests cross the edges of tiles.
INTERPRETED = Launch(32, 32, 32, 1, 1)


def launch_config(kernel: str, x: torch.Tensor) -> Launch:
    """The table's row for the kernel ("fwd" or "bwd") on the device and dtype of `x`."""
    if not x.is_cuda:
        return INTERPRETED
    major = torch.cuda.get_device_capability(x.device)[0]
    arch = 80 if major <= 8 else 90 if major == 9 else 100
    return TABLE[kernel, x.element_size(), arch]


def chunk_rows(num_cols: int, element_size: int) -> int:
    """Rows of dL/dS that pass 2 holds at a time."""
    fitting = CHUNK_BYTES // max(num_cols * element_size, 1) // 128 * 128
    return min(max(fitting, MIN_CHUNK), MAX_CHUNK)


def input_precision() -> str:
    """Float32 dot products are exact unless torch was asked for TF32, by either of its two APIs."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
