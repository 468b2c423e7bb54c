"""What an op declares once, to be held to the contract test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Shape = Mapping[str, int]
Inputs = dict[str, Any]


class Terms(NamedTuple):
    """The size of what cancels in a formula, and is rounded before by any algorithm that stores no matrix.

    `summed`: terms in the accumulator's dtype, whatever the inputs' is; `stored`: in the result's.
    """

    summed: float
    stored: float = 0.0


@dataclass(frozen=True)
class OpSpec:
    """An op's entry in the contract test.

    Attributes:
        name: the public function's name, in brackets the variant: the test's id.
        op: the public function.
        ref: its eager reference, same signature.
        make_inputs: keyword arguments for a shape, a data case, a dtype and a seed, on the CPU; tensors may be
            nested in tuples.
        shapes: those of the contract: 1, odd, not a power of two, one past a tile.
        draw_shape: any small shape, from a function that draws an integer between two bounds, both included.
        cases: names of the data that `make_inputs` can make; the first is the plainest.
        differentiable: arguments with a gradient.
        dtypes: what the contract runs.
        casts_under_autocast: whether its tensors are cast there, as a matrix product's are.
        terms: from the inputs and the results in float64, by result, where its formula cancels.
    """

    name: str
    op: Callable[..., Any]
    ref: Callable[..., Any]
    make_inputs: Callable[[Shape, str, torch.dtype, int], Inputs]
    shapes: tuple[Shape, ...]
    draw_shape: Callable[[Callable[[int, int], int]], Shape]
    cases: tuple[str, ...]
    differentiable: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    casts_under_autocast: bool = True
    terms: Callable[[Inputs, Mapping[str, torch.Tensor]], Mapping[str, Terms]] | None = None


def shape_id(shape: Shape) -> str:
    """`{"B": 8, "D": 4}` as `B8-D4`."""
    return "-".join(f"{axis}{size}" for axis, size in shape.items())
