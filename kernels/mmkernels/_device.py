"""The one switch between the Triton kernels and the blockwise ATen paths."""

from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from triton import knobs
else:
    knobs = None


def runs_triton(x: torch.Tensor) -> bool:
    """True where the Triton kernel serves `x`: on a GPU, or anywhere under `TRITON_INTERPRET=1`.

    Float64 has no tensor-core path worth a kernel; it takes the blockwise path on every device.
    """
    return knobs is not None and x.dtype != torch.float64 and (x.is_cuda or knobs.runtime.interpret)
