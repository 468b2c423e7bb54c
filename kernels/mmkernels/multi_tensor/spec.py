"""The multi-tensor updates' entries in the contract test and in bench, as functions of new tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels._spec import Cost, Inputs, OpSpec, Shape
from mmkernels.multi_tensor.adamw import adamw_update_
from mmkernels.multi_tensor.ema import ema_update_
from mmkernels.multi_tensor.ewc import ewc_penalty, fisher_accumulate_
from mmkernels.multi_tensor.norm import clip_, global_norm
from mmkernels.multi_tensor.packnet import apply_masks_
from mmkernels.multi_tensor.reference import (
    adamw_update_ref_,
    apply_masks_ref_,
    clip_ref_,
    ema_update_ref_,
    ewc_penalty_ref,
    fisher_accumulate_ref_,
    global_norm_ref,
)
from mmkernels.multi_tensor.table import CHUNK

Tensors = tuple[Tensor, ...]


def _sizes(shape: Shape) -> list[int]:
    """Of N tensors up to L elements: a whole list, then ever fewer, of which one has none."""
    return [shape["L"] * (i + 1) // shape["N"] for i in range(shape["N"])] + [0]


def _normal(shape: Shape, seed: int) -> Callable[[], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: [torch.randn(n, generator=generator, dtype=torch.float64) for n in _sizes(shape)]


def _cat(tensors: Tensors) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _ema_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """near: a source a hundredth from its average; far: another tensor."""
    normal = _normal(shape, seed)
    targets, noise = normal(), normal()
    sources = [t + 0.01 * n if case == "near" else n for t, n in zip(targets, noise, strict=True)]
    return {
        "targets": tuple(x.to(dtype) for x in targets),
        "sources": tuple(x.to(dtype) for x in sources),
        "decay": 0.9,
    }


def _averaged(fn: Callable[..., None], targets: Tensors, sources: Tensors, decay: float, *, shadowed: bool) -> Any:
    """New averages, and their copies, each as one tensor."""
    targets = tuple(x.clone() for x in targets)
    shadows = [torch.empty_like(x) for x in targets] if shadowed else None
    fn(targets, sources, decay, shadows=shadows)
    return (_cat(targets),) if shadows is None else (_cat(targets), _cat(tuple(shadows)))


def _adamw_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """first: moments of zero, as before the first step; later: those of a run."""
    normal = _normal(shape, seed)
    params, grads, exp_avgs, exp_avg_sqs, averages = (normal() for _ in range(5))
    begun = float(case == "later")
    found: Inputs = {
        "params": tuple(x.to(dtype) for x in params),
        "grads": tuple(x.to(dtype) for x in grads),
        "exp_avgs": tuple((0.1 * begun * x).to(dtype) for x in exp_avgs),
        "exp_avg_sqs": tuple((begun * x * x).to(dtype) for x in exp_avg_sqs),
        "averages": tuple(x.to(torch.promote_types(dtype, torch.float32)) for x in averages),
    }
    return found | {"lr": 1e-2, "step": 7 if begun else 1}


def _stepped(
    fn: Callable[..., None],
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    averages: Tensors,
    lr: float,
    step: int,
    *,
    averaged: bool,
) -> Any:
    """New parameters, moments, averages and the copies of two of them, each as one tensor."""
    lists = [tuple(x.clone() for x in part) for part in (params, exp_avgs, exp_avg_sqs, averages)]
    copies = [tuple(torch.empty_like(x) for x in part) for part in (params, params)]
    optional = {"averages": lists[3], "decay": 0.9, "copies": copies[0], "shadows": copies[1]}
    settings = {"lr": lr, "step": step, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "clamp": (-2, 2)}
    fn(lists[0], grads, *lists[1:3], **settings, **(optional if averaged else {}))
    return tuple(_cat(part) for part in (*lists, *copies)) if averaged else tuple(_cat(part) for part in lists[:3])


def _norm_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    return {"tensors": tuple(x.to(dtype) for x in _normal(shape, seed)())}


def _clip_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """clipped: to a hundredth; kept: below the bound."""
    return _norm_inputs(shape, case, dtype, seed) | {"max_norm": 0.01 if case == "clipped" else 1e6}


def _clipped(fn: Callable[..., Tensor], tensors: Tensors, max_norm: float) -> Any:
    """The norm, and the clipped tensors as one."""
    tensors = tuple(x.clone() for x in tensors)
    return fn(tensors, max_norm), _cat(tensors)


def _fisher_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """sum: of squares; online: the old fade."""
    normal = _normal(shape, seed)
    return {
        "fishers": tuple(x.square().to(torch.promote_types(dtype, torch.float32)) for x in normal()),
        "grads": tuple(x.to(dtype) for x in normal()),
        "weight": 1.0 if case == "sum" else 0.3,
        "decay": 1.0 if case == "sum" else 0.9,
    }


def _accumulated(fn: Callable[..., None], fishers: Tensors, grads: Tensors, **factors: float) -> Any:
    fishers = tuple(x.clone() for x in fishers)
    fn(fishers, grads, **factors)
    return _cat(fishers)


def _ewc_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """far: anchors of their own; near: a hundredth away."""
    normal = _normal(shape, seed)
    params, noise, fishers = normal(), normal(), normal()
    anchors = [p + 0.01 * n if case == "near" else n for p, n in zip(params, noise, strict=True)]
    return {
        "params": _cat(tuple(params)).to(dtype),
        "anchors": tuple(x.to(dtype) for x in anchors),
        "fishers": tuple(x.square().to(torch.promote_types(dtype, torch.float32)) for x in fishers),
        "strength": 0.7,
    }


def _penalized(fn: Callable[..., Tensor], params: Tensor, anchors: Tensors, **rest: Any) -> Any:
    """Of one tensor's parts, so that its gradient is theirs."""
    return fn(params.split([len(x) for x in anchors]), anchors, **rest)


def _mask_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """bool; owners: the second and the third of five tasks."""
    normal = _normal(shape, seed)
    tensors = tuple(x.to(dtype) for x in normal())
    masks = [x > 0 if case == "bool" else (2 + x).clamp(0, 5).to(torch.uint8) for x in normal()]
    return {"tensors": tensors, "masks": tuple(masks), "owners": None if case == "bool" else (2, 3)}


def _masked(fn: Callable[..., None], tensors: Tensors, masks: Tensors, owners: tuple[int, int] | None) -> Any:
    tensors = tuple(x.clone() for x in tensors)
    fn(tensors, masks, owners=owners)
    return _cat(tensors)


def _draw(draw: Callable[[int, int], int]) -> Shape:
    return {"N": draw(1, 4), "L": draw(0, 2 * CHUNK)}


SHAPES = ({"N": 1, "L": 1}, {"N": 3, "L": 37}, {"N": 2, "L": CHUNK}, {"N": 3, "L": 2 * CHUNK + 5})


def _spec(
    name: str, op: Any, ref: Any, inputs: Any, cases: tuple[str, ...], accesses: float, backward: tuple[str, ...] = ()
) -> OpSpec:
    """`accesses`: reads and writes of an element, and one more for a gradient."""

    def cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
        moved = sum(_sizes(shape)) * element_size
        return Cost(bytes_moved=int(accesses * moved)), Cost(bytes_moved=int((accesses + 1) * moved))

    return OpSpec(
        name=name,
        op=op,
        ref=ref,
        make_inputs=inputs,
        shapes=SHAPES,
        draw_shape=_draw,
        cases=cases,
        differentiable=backward,
        cost=cost,
        bench_shapes={"cpu": (), "cuda": ()},
        casts_under_autocast=False,
    )


def _both(run: Callable[..., Any], op: Any, ref: Any) -> tuple[Any, Any]:
    return partial(run, op), partial(run, ref)


def _ema(variant: str, accesses: int, *, shadowed: bool) -> OpSpec:
    op, ref = (partial(_averaged, fn, shadowed=shadowed) for fn in (ema_update_, ema_update_ref_))
    return _spec(f"ema_update_{variant}", op, ref, _ema_inputs, ("near", "far"), accesses)


def _adamw(variant: str, accesses: int, *, averaged: bool) -> OpSpec:
    op, ref = (partial(_stepped, fn, averaged=averaged) for fn in (adamw_update_, adamw_update_ref_))
    return _spec(f"adamw_update_{variant}", op, ref, _adamw_inputs, ("later", "first"), accesses)


EMA, SHADOWED = _ema("", 3, shadowed=False), _ema("[shadows]", 4, shadowed=True)
ADAMW, AVERAGED = _adamw("", 7, averaged=False), _adamw("[averages]", 11, averaged=True)
NORM = _spec("global_norm", global_norm, global_norm_ref, _norm_inputs, ("normal",), 1)
CLIP = _spec("clip_", *_both(_clipped, clip_, clip_ref_), _clip_inputs, ("clipped", "kept"), 3)
FISHER = _spec(
    "fisher_accumulate_",
    *_both(_accumulated, fisher_accumulate_, fisher_accumulate_ref_),
    _fisher_inputs,
    ("online", "sum"),
    3,
)
EWC = _spec(
    "ewc_penalty", *_both(_penalized, ewc_penalty, ewc_penalty_ref), _ewc_inputs, ("far", "near"), 3, ("params",)
)
MASKS = _spec("apply_masks_", *_both(_masked, apply_masks_, apply_masks_ref_), _mask_inputs, ("bool", "owners"), 2.25)
SPECS = (EMA, SHADOWED, ADAMW, AVERAGED, NORM, CLIP, FISHER, EWC, MASKS)
