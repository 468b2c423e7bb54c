"""What the modules of `bench/ops` are made of: timed cases by their axes, and claims, which paired runs assert."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.case import Case, dtype_id
from bench.measure import machine_rates, paired_medians, peak_extra_bytes, relative_error
from bench.spec import shape_id
from mmkernels._cost import Cost

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
VARIABLE = "MMCORE_BENCH_DTYPE"
# of features, or of autocast in training steps; `--dtype` names another
DTYPE: torch.dtype = getattr(torch, os.environ.get(VARIABLE, "bfloat16" if ON_GPU else "float32"))
CPU = torch.device("cpu")
# by its name, what raises AssertionError where it does not hold
Claims = dict[str, Callable[[], None]]


def of_shape(shape: Any) -> float:
    """The product of a shape's sizes; 0 of what is none."""
    return float(math.prod(shape.values())) if isinstance(shape, Mapping) else 0.0


@dataclass(frozen=True)
class Bench:
    """The timed cases of an op: every combination of the values of its axes.

    Attributes:
        name: of the public function, a variant in brackets: the first word of the ids.
        case: from a value of each axis, by name; it skips what is not served here.
        axes: by name the values, in the order of the ids; one is "contender".
        peers: contenders that are skipped where the library of this name is missing.
        size: of the values of the axes, to begin with the largest.
    """

    name: str
    case: Callable[..., Case]
    axes: Mapping[str, Sequence[Any]]
    peers: tuple[str, ...] = ()
    size: Callable[[Mapping[str, Any]], float] = lambda axes: of_shape(axes.get("shape"))

    def params(self) -> Iterator[Any]:
        """For pytest: the bench, and a value of each axis by name."""
        for values in itertools.product(*self.axes.values()):
            axes = dict(zip(self.axes, values, strict=True))
            yield pytest.param(self, axes, id="-".join([self.name, *map(_id, values)]))


def _id(value: Any) -> str:
    if isinstance(value, Mapping):
        return shape_id(value)
    return dtype_id(value) if isinstance(value, torch.dtype) else str(value)


def of_mode(mode: str, forward: Cost, backward: Cost) -> Cost:
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def gradient_case(
    group: str,
    contender: str,
    loss: Callable[[], Tensor],
    wrt: tuple[Tensor, ...],
    mode: str,
    cost: Cost,
    *,
    rate: float | None = None,
    gold: Callable[[], Tensor] | None = None,
) -> Case:
    """A case of an op with gradients.

    Its roofline is the bare products of its cost at `rate` FLOP/s, or without one a copy of its bytes. `gold` makes the
    first leaf's gradient in float64.
    """

    def error() -> float:
        assert gold is not None
        return relative_error(torch.autograd.grad(loss(), wrt[0])[0], gold())

    return Case(
        group=group,
        contender=contender,
        loss=loss,
        wrt=wrt,
        mode=mode,
        floor_s=cost.bytes_moved / machine_rates(DEVICE)[0] if rate is None else cost.flops / rate,
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=1.0 if rate is None else rate,
        error=None if gold is None else error,
    )


def assert_faster(
    ours: Callable[[], Tensor],
    other: Callable[[], Tensor],
    wrt: tuple[Tensor, ...],
    *,
    least: float,
    rounds: int = 7,
    most_bytes: int | None = None,
) -> float:
    """Forward and backward of ours on a CPU are so many times as fast as another's, and hold no more than so many bytes
    beyond the gradients; our seconds."""
    losses = {"ours": ours, "other": other}
    runs = {name: lambda loss=loss: torch.autograd.grad(loss(), wrt) for name, loss in losses.items()}
    medians = paired_medians(runs, rounds, CPU)
    extra = None if most_bytes is None else peak_extra_bytes(runs["ours"], CPU)
    ratio = medians["other"] / medians["ours"]
    print(f"the other {medians['other']:.4f} s, mmkernels {medians['ours']:.4f} s: {ratio:.2f}x; extra {extra} bytes")
    assert ratio >= least
    assert extra is None or most_bytes is None or extra - sum(x.nbytes for x in wrt) <= most_bytes
    return medians["ours"]
