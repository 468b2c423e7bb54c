"""`mmkernels.fisher_accumulate_` and `ewc_penalty`: their entries in the contract test, and the parameters of models
beside foreach and the loop of others."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Claims
from bench.lists import Call, Contenders, Tensors, assert_not_slower, bench_of, joined, list_spec, normal, normal_of
from bench.spec import Inputs, Shape
from mmkernels import ewc_penalty, ewc_penalty_ref, fisher_accumulate_, fisher_accumulate_ref_


def _fisher_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """sum: of squares; online: the old fade."""
    normal = normal_of(shape, seed)
    return {
        "fishers": tuple(x.square().to(torch.promote_types(dtype, torch.float32)) for x in normal()),
        "grads": tuple(x.to(dtype) for x in normal()),
        "weight": 1.0 if case == "sum" else 0.3,
        "decay": 1.0 if case == "sum" else 0.9,
    }


def _accumulated(fn: Callable[..., None], fishers: Tensors, grads: Tensors, **factors: float) -> Any:
    fishers = tuple(x.clone() for x in fishers)
    fn(fishers, grads, **factors)
    return joined(fishers)


def _ewc_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """far: anchors of their own; near: a hundredth away."""
    normal = normal_of(shape, seed)
    params, noise, fishers = normal(), normal(), normal()
    anchors = [p + 0.01 * n if case == "near" else n for p, n in zip(params, noise, strict=True)]
    return {
        "params": joined(tuple(params)).to(dtype),
        "anchors": tuple(x.to(dtype) for x in anchors),
        "fishers": tuple(x.square().to(torch.promote_types(dtype, torch.float32)) for x in fishers),
        "strength": 0.7,
    }


def _penalized(fn: Callable[..., Tensor], params: Tensor, anchors: Tensors, **rest: Any) -> Any:
    """Of one tensor's parts, so that its gradient is theirs."""
    return fn(params.split([len(x) for x in anchors]), anchors, **rest)


FISHER = list_spec(
    "fisher_accumulate_",
    partial(_accumulated, fisher_accumulate_),
    partial(_accumulated, fisher_accumulate_ref_),
    _fisher_inputs,
    ("online", "sum"),
)
EWC = list_spec(
    "ewc_penalty",
    partial(_penalized, ewc_penalty),
    partial(_penalized, ewc_penalty_ref),
    _ewc_inputs,
    ("far", "near"),
    ("params",),
)
SPECS = (FISHER, EWC)

STRENGTH, WEIGHT, DECAY = 0.5, 0.1, 0.9


def our_fisher(name: str, device: torch.device) -> Call:
    fishers, grads = normal(name, device), normal(name, device)
    return Call(lambda: fisher_accumulate_(fishers, grads, weight=WEIGHT, decay=DECAY))


def foreach_fisher(name: str, device: torch.device) -> Call:
    fishers, grads = normal(name, device), normal(name, device)

    def run() -> None:
        torch._foreach_mul_(fishers, DECAY)
        torch._foreach_addcmul_(fishers, grads, grads, WEIGHT)

    return Call(run)


def penalty_lists(name: str, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params = [x.requires_grad_() for x in normal(name, device)]
    return params, normal(name, device), [x.square_() for x in normal(name, device)]


def our_penalty(name: str, device: torch.device) -> Call:
    lists = penalty_lists(name, device)
    return Call(lambda: ewc_penalty(*lists, STRENGTH), tuple(lists[0]))


def loop_penalty(name: str, device: torch.device) -> Call:
    """Avalanche's and most others'."""
    lists = penalty_lists(name, device)

    def run() -> Tensor:
        penalty = torch.zeros((), device=device)
        for param, anchor, fisher in zip(*lists, strict=True):
            penalty += (fisher * (param - anchor).pow(2)).sum()
        return STRENGTH / 2 * penalty

    return Call(run, tuple(lists[0]))


# bytes that an element's has to read and write, and contenders
TIMED: dict[str, tuple[int, Contenders]] = {
    "fisher_accumulate_": (12, {"mmkernels": our_fisher, "foreach": foreach_fisher}),
    "ewc_penalty": (28, {"mmkernels": our_penalty, "loop": loop_penalty}),
}
BENCHES = tuple(bench_of(op, *timed) for op, timed in TIMED.items())
CLAIMS: Claims = {f"{op} is not slower than others'": partial(assert_not_slower, op, TIMED[op][1]) for op in TIMED}
