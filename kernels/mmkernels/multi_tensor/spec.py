"""The multi-tensor updates' entries in the contract test and in bench, as functions of new tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels._spec import Cost, Inputs, OpSpec, Shape
from mmkernels.multi_tensor.op import ema_update_
from mmkernels.multi_tensor.reference import ema_update_ref_
from mmkernels.multi_tensor.table import CHUNK

CASES = ("near", "far")
Tensors = tuple[Tensor, ...]


def _sizes(shape: Shape) -> list[int]:
    """Of N tensors up to L elements: a whole list, then ever fewer, of which one has none."""
    return [shape["L"] * (i + 1) // shape["N"] for i in range(shape["N"])] + [0]


def _make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """near: a source a hundredth from its average; far: another tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> list[Tensor]:
        return [torch.randn(n, generator=generator, dtype=torch.float64) for n in _sizes(shape)]

    targets, noise = normal(), normal()
    sources = [t + 0.01 * n if case == "near" else n for t, n in zip(targets, noise, strict=True)]
    return {
        "targets": tuple(x.to(dtype) for x in targets),
        "sources": tuple(x.to(dtype) for x in sources),
        "decay": 0.9,
    }


def _updated(
    fn: Callable[..., None], targets: Tensors, sources: Tensors, decay: float, *, shadowed: bool
) -> Any:
    """New averages, and their copies, each as one tensor."""
    targets = tuple(x.clone() for x in targets)
    shadows = [torch.empty_like(x) for x in targets] if shadowed else None
    fn(targets, sources, decay, shadows=shadows)
    found = (torch.cat([x.flatten() for x in targets]),)
    return found if shadows is None else (*found, torch.cat([x.flatten() for x in shadows]))


def _cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    return Cost(bytes_moved=3 * sum(_sizes(shape)) * element_size), Cost()


def _draw(draw: Callable[[int, int], int]) -> Shape:
    return {"N": draw(1, 4), "L": draw(0, 2 * CHUNK)}


SHAPES = ({"N": 1, "L": 1}, {"N": 3, "L": 37}, {"N": 2, "L": CHUNK}, {"N": 3, "L": 2 * CHUNK + 5})


def _spec(variant: str, *, shadowed: bool) -> OpSpec:
    return OpSpec(
        name=f"ema_update_{variant}",
        op=partial(_updated, ema_update_, shadowed=shadowed),
        ref=partial(_updated, ema_update_ref_, shadowed=shadowed),
        make_inputs=_make_inputs,
        shapes=SHAPES,
        draw_shape=_draw,
        cases=CASES,
        differentiable=(),
        cost=_cost,
        bench_shapes={"cpu": (), "cuda": ()},
        casts_under_autocast=False,
    )


EMA = _spec("", shadowed=False)
SHADOWED = _spec("[shadows]", shadowed=True)
SPECS = (EMA, SHADOWED)
