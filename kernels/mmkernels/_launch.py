"""What the launch tables of the Triton kernels are made of: pure functions of shape, dtype and architecture, so that
all ranks agree.

Every row compiles ahead of time for its architecture without spills, under triton 3.6 and 3.7; none was timed yet.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmkernels._checks import require


@dataclass(frozen=True)
class Launch:
    """Tile sizes (a power of two each, at least 16), warps and pipeline stages of a kernel."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


# (kernel, bytes an element, architecture): sm_80 serves 8.x, sm_90 serves 9.x, sm_100 serves 10.x and later.
Table = Mapping[tuple[str, int, int], Launch]
# A kernel that leaves products to the GEMM library holds one [chunk, N] buffer of dL/dS: 256 MiB of it, but never
# fewer rows than keep a GEMM busy.
CHUNK_BYTES = 256 << 20
MIN_CHUNK, MAX_CHUNK = 1024, 4096
# What CUDA launches along each axis.
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)
# The interpreter's: small, so that small tests cross the edges of tiles.
INTERPRETED = Launch(32, 32, 32, 1, 1)
INTERPRETED_PROCESSORS = 2


def architecture(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0]
    return 80 if major <= 8 else 90 if major == 9 else 100


def processors(x: Tensor) -> int:
    """How many run side by side where `x` lies: programs that walk over tiles are as many."""
    return _processors(x.device) if x.is_cuda else INTERPRETED_PROCESSORS


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_config(table: Table, kernel: str, x: Tensor) -> Launch:
    """The table's row for a kernel on the device and dtype of `x`."""
    return table[kernel, x.element_size(), architecture(x.device)] if x.is_cuda else INTERPRETED


def tile_flags(config: Launch) -> dict[str, Any]:
    """A kernel of products' tile, and how it is compiled."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "INPUT_PRECISION": input_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **flags: Any) -> None:
    """Runs a kernel on the device of its first argument, whichever is the current one, on that device's stream."""
    fits = all(map(int.__le__, grid, MOST_PROGRAMS))
    require("launch", fits, "a grid must be at most {}, got {}", MOST_PROGRAMS, grid)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](x, *arguments, **flags)


def constant_launch(config: Launch, x: Tensor) -> Launch:
    """Of a kernel that is launched alike for every dtype and architecture."""
    return config if x.is_cuda else INTERPRETED


def input_precision() -> str:
    """Float32 dot products are exact unless torch was asked for TF32, by either of its two APIs."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def chunk_rows(num_cols: int, element_size: int) -> int:
    """Rows of dL/dS `[chunk, N]` to hold at a time."""
    fitting = CHUNK_BYTES // max(num_cols * element_size, 1) // 128 * 128
    return min(max(fitting, MIN_CHUNK), MAX_CHUNK)
