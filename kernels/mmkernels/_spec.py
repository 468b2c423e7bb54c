"""What an op declares once, to be held to the contract test and timed by bench."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shape = Mapping[str, int]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """An op's entry in the contract test and in bench.

    Attributes:
        name: the public function's name; the test's and the benchmark's id.
        op: the public function.
        ref: its eager reference, same signature.
        make_inputs: keyword arguments for a shape, a data case, a dtype and a seed, on the CPU.
        shapes: those of the contract: 1, odd, not a power of two, one past a tile.
        cases: names of the data that `make_inputs` can make; the first is the plainest.
        differentiable: arguments with a gradient.
        flops: floating-point operations of forward and of backward, by shape.
        bytes_moved: least bytes read and written by forward and by backward, by shape and bytes an element.
        bench_shapes: by device type, smallest first.
        dtypes: what the contract runs.
    """

    name: str
    op: Callable[..., Any]
    ref: Callable[..., Any]
    make_inputs: Callable[[Shape, str, torch.dtype, int], Inputs]
    shapes: tuple[Shape, ...]
    cases: tuple[str, ...]
    differentiable: tuple[str, ...]
    flops: Callable[[Shape], tuple[int, int]]
    bytes_moved: Callable[[Shape, int], tuple[int, int]]
    bench_shapes: Mapping[str, tuple[Shape, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


def shape_id(shape: Shape) -> str:
    """`{"B": 8, "D": 4}` as `B8-D4`."""
    return "-".join(f"{axis}{size}" for axis, size in shape.items())
