"""The one switch between the Triton kernels and the blockwise ATen paths."""

from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from triton import knobs

    # read once: a kernel is bound to the interpreter, or not, when its module is imported
    INTERPRETED: bool = knobs.runtime.interpret
else:
    INTERPRETED = False


def runs_triton(x: torch.Tensor) -> bool:
    """True where the Triton kernel serves `x`: on a GPU, or anywhere under `TRITON_INTERPRET=1`.

    Float64 has no tensor-core path worth a kernel; it takes the blockwise path on every device.
    """
    return HAS_TRITON and x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)
