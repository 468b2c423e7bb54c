"""`mmkernels.global_norm` and `clip_`: their entries in the contract test, and the parameters of models beside what
torch has for them."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Claims
from bench.lists import Call, Contenders, Tensors, assert_not_slower, bench_of, joined, list_spec, normal, normal_of
from bench.spec import Inputs, Shape
from mmkernels import clip_, clip_ref_, global_norm, global_norm_ref


def _norm_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    return {"tensors": tuple(x.to(dtype) for x in normal_of(shape, seed)())}


def _clip_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """clipped: to a hundredth; kept: below the bound."""
    return _norm_inputs(shape, case, dtype, seed) | {"max_norm": 0.01 if case == "clipped" else 1e6}


def _clipped(fn: Callable[..., Tensor], tensors: Tensors, max_norm: float) -> Any:
    """The norm, and the clipped tensors as one."""
    tensors = tuple(x.clone() for x in tensors)
    return fn(tensors, max_norm), joined(tensors)


NORM = list_spec("global_norm", global_norm, global_norm_ref, _norm_inputs, ("normal",))
CLIP = list_spec("clip_", partial(_clipped, clip_), partial(_clipped, clip_ref_), _clip_inputs, ("clipped", "kept"))
SPECS = (NORM, CLIP)


def our_norm(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    return Call(lambda: global_norm(grads))


def torch_norm(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    return Call(lambda: torch.nn.utils.get_total_norm(grads, foreach=True))


def our_clip(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    norm = float(global_norm(grads))
    # every call has something to clip
    bounds = (norm * 0.999**i for i in itertools.count(1))
    return Call(lambda: clip_(grads, next(bounds)))


def our_clip_below(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    return Call(lambda: clip_(grads, 1e9))


def torch_clip(name: str, device: torch.device) -> Call:
    params = [torch.nn.Parameter(x) for x in normal(name, device)]
    for param in params:
        param.grad = torch.randn_like(param)
    # it multiplies even by 1
    return Call(lambda: torch.nn.utils.clip_grad_norm_(params, 1e9, foreach=True))


# bytes that an element's has to read and write, and contenders
TIMED: dict[str, tuple[int, Contenders]] = {
    "global_norm": (4, {"mmkernels": our_norm, "get_total_norm": torch_norm}),
    "clip_": (12, {"mmkernels": our_clip, "clip_grad_norm_": torch_clip}),
    "clip_[nothing to do]": (4, {"mmkernels": our_clip_below, "clip_grad_norm_": torch_clip}),
}
BENCHES = tuple(bench_of(op, *timed) for op, timed in TIMED.items())
CLAIMS: Claims = {f"{op} is not slower than torch's": partial(assert_not_slower, op, TIMED[op][1]) for op in TIMED}
