"""The bound that every path of every op obeys: no further from float64 than the eager reference, within
rounding.

`max|op - gold| <= 2 * max|ref - gold| + 4 * eps(dtype) * max|gold|`, gold being the reference in float64; with the
cancelling `terms` that a spec declares, four of their roundings besides. An output wider than the inputs (float32
from bfloat16) is held to the reference of the same inputs in that wider dtype.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bench.spec import Inputs, OpSpec, Shape, Terms
from mmkernels._checks import accumulator

NONE = Terms(0.0, 0.0)


@dataclass(frozen=True)
class Error:
    """Largest errors against float64, the op's and the reference's, and one rounding of the largest value."""

    of_op: float
    of_ref: float
    rounding: float  # of the terms that cancel too


def map_tensors(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with each of their tensors changed, those nested in tuples too."""
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, inputs)


def cast_inputs(inputs: Inputs, dtype: torch.dtype | None = None, device: str | None = None) -> Inputs:
    """The inputs with their floating-point tensors in another dtype, and all tensors on another device."""
    return map_tensors(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None), inputs)


def evaluate(fn: Callable[..., Any], inputs: Inputs, wrt: Iterable[str], seed: int = 0) -> dict[str, Tensor]:
    """Outputs (`out0`, ...) and gradients (`d_<argument>`) under random upstream gradients drawn by seed."""
    wrt = tuple(wrt)
    inputs = {
        name: value.detach().requires_grad_(name in wrt) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    result = fn(**inputs)
    outputs: tuple[Tensor, ...] = (result,) if isinstance(result, Tensor) else tuple(result)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.rand(x.shape, generator=generator, dtype=torch.float64).add(0.5).to(x) for x in outputs]
    grads = ()
    if wrt:
        # a field that was not asked for is empty and has no gradient
        through = [(x, d) for x, d in zip(outputs, upstream, strict=True) if x.numel()]
        of, by = zip(*through, strict=True)
        grads = torch.autograd.grad(of, [inputs[name] for name in wrt], by)
    values = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    return values | {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}


def errors(spec: OpSpec, inputs: Inputs, seed: int = 0) -> dict[str, Error]:
    """For each output and gradient, the errors that the bound is made of."""
    got = evaluate(spec.op, inputs, spec.differentiable, seed)
    wide = cast_inputs(inputs, torch.float64)
    gold = evaluate(spec.ref, wide, spec.differentiable, seed)
    terms = {} if spec.terms is None else spec.terms(wide, gold)
    # float64 has no better judge than itself: the reference's error there is inferred from its float32 one,
    # and doubled because the judge errs as well
    judged = {name: torch.float32 if x.dtype == torch.float64 else x.dtype for name, x in got.items()}
    refs = {
        dtype: evaluate(spec.ref, cast_inputs(inputs, dtype), spec.differentiable, seed)
        for dtype in set(judged.values())
    }
    return {
        name: Error(
            of_op=_distance(value, gold[name]),
            of_ref=_distance(refs[judged[name]][name], gold[name])
            * (
                2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
                if value.dtype == torch.float64
                else 1
            ),
            rounding=torch.finfo(value.dtype).eps * (_largest(gold[name]) + terms.get(name, NONE).stored)
            + torch.finfo(accumulator(value.dtype)).eps * terms.get(name, NONE).summed,
        )
        for name, value in got.items()
    }


def check(
    spec: OpSpec,
    shape: Shape,
    case: str,
    dtype: torch.dtype,
    device: str = "cpu",
    seeds: Iterable[int] = range(8),
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Raise AssertionError, naming each output and gradient that breaks the bound.

    The maxima are over all seeds: a scalar's error on one draw alone says nothing of the size of such errors. Where
    the reference may have been lucky in all of them, the bound being missed by less than twice, three times as many
    more decide.
    """

    def drawn(seed: int) -> dict[str, Error]:
        inputs = cast_inputs(spec.make_inputs(shape, case, dtype, seed), device=device)
        return errors(spec, map_tensors(layout, inputs), seed)

    seeds = list(seeds)
    draws = [drawn(seed) for seed in seeds]
    broken = _broken(draws)
    if broken and not _broken(draws, 2.0):
        draws += [drawn(seed) for seed in range(max(seeds) + 1, max(seeds) + 1 + 3 * len(seeds))]
        broken = _broken(draws)
    if broken:
        raise AssertionError(f"{spec.name} {dict(shape)} {case} {dtype}: {', '.join(broken)}")


def _broken(draws: list[dict[str, Error]], times: float = 1.0) -> list[str]:
    """What is further off than so many times its bound."""
    broken = []
    for name in draws[0]:
        error, bound = max(draw[name].of_op for draw in draws), bound_of([draw[name] for draw in draws])
        if not all(draw[name].of_op <= times * bound for draw in draws):  # so that a NaN breaks it too
            broken.append(f"{name}: error {error:.3g}, bound {bound:.3g}")
    return broken


def bound_of(draws: list[Error]) -> float:
    """The bound's right-hand side, over several draws of the data."""
    return 2 * max(draw.of_ref for draw in draws) + 4 * max(draw.rounding for draw in draws)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _distance(x: Tensor, gold: Tensor) -> float:
    if x.shape != gold.shape:
        raise AssertionError(f"shape {list(x.shape)}, expected {list(gold.shape)}")
    return _largest(x.double() - gold)
