"""The one switch between the Triton kernels and the blockwise ATen paths."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

HAS_TRITON = find_spec("triton") is not None
# read once, as triton does: a kernel is bound to the interpreter, or not, when its module is imported
INTERPRETED: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


class Kernels:
    """An op's module of Triton launchers, imported when the first of them is looked up: triton takes longer than all
    else that this package imports, and a CPU has no use for it."""

    def __init__(self, package: str) -> None:
        self._module = f"{package}.kernel"

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)


def runs_triton(x: torch.Tensor) -> bool:
    """True where the Triton kernel serves `x`: on a GPU, or anywhere under `TRITON_INTERPRET=1`.

    Float64 has no tensor-core path worth a kernel; it takes the blockwise path on every device.
    """
    return HAS_TRITON and x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)


def may_compose(x: torch.Tensor) -> bool:
    """Whether torch's own ops may take the place of kernels on a GPU, which the interpreter is there to run."""
    return x.is_cuda and not INTERPRETED


def is_capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is captured of what is launched on `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Awaited:
    """A number on its way from the device to the host, which waits for it only where it is asked for."""

    def __init__(self, number: torch.Tensor) -> None:
        self._event = torch.cuda.Event() if number.is_cuda else None
        self._number = number.to("cpu", non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(number.device))

    def __call__(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._number)
