"""Elastic weight consolidation on lists of tensors: what weights matter, and what it costs to move those."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import has_no_derivative
from mmkernels._checks import require
from mmkernels.multi_tensor import paths
from mmkernels.multi_tensor.paths import ADDRESSED, WIDE, path_of, prepared, table_in_op, total_dtype
from mmkernels.multi_tensor.table import Table


@torch.no_grad()
def fisher_accumulate_(
    fishers: Sequence[Tensor], grads: Sequence[Tensor], *, weight: float = 1.0, decay: float = 1.0
) -> None:
    """`fisher = decay fisher + weight grad^2` of every tensor, in place and in one launch: the diagonal of the
    empirical Fisher information.

    Args:
        fishers: distinct tensors of one device, float32 or float64, any shapes; dense.
        grads: of their shapes, float32, float16, bfloat16 or float64; where strides differ, one is copied first.
        weight: of the new squares, at least 0: one over the number of samples, say.
        decay: of the old sum, from 0 to 1; below 1 the tasks of before fade, as in online EWC. A captured graph keeps
            the weight and the decay of its capture.

    Raises:
        ValueError: lists that do not match, a dtype, a device, memory in common, `weight` or `decay`.

    Reference: `fisher_accumulate_ref_`. Papers: arXiv:1612.00796 (EWC), arXiv:1805.06370 (online EWC).
    """
    op = "fisher_accumulate_"
    require(op, 0 <= weight < math.inf, "weight must be at least 0, got {}", weight)
    require(op, 0 <= decay <= 1, "decay must be from 0 to 1, got {}", decay)
    given = {"fishers": fishers, "grads": grads}
    (fishers, grads), table = prepared(op, given, ("fishers",), {"fishers": WIDE})
    if not fishers:
        return
    if torch.compiler.is_compiling():
        _fisher_accumulate(fishers, grads, weight, decay)
    else:
        _accumulate(fishers, grads, weight, decay, table)
        torch.autograd.graph.increment_version(fishers)


def ewc_penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor], strength: float
) -> Tensor:
    """`strength / 2 sum fisher (param - anchor)^2` over every element, in one launch, and its gradient in another.

    Args:
        params: tensors of one device, float32, float16, bfloat16 or float64, any shapes; those that require a
            gradient get one, `strength fisher (param - anchor)`, in their own dtypes.
        anchors, fishers: of their shapes, of any of these dtypes; constants. Where strides differ, one is copied.
        strength: at least 0; a captured graph keeps that of its capture.

    Returns:
        `[]` on their device, float32, or float64 where a tensor is; added in float64, on a GPU in float32 by up to
        4,096. Reruns give the same bits. Zero of no tensors.

    Raises:
        ValueError: lists that do not match, a dtype, a device, or `strength`.

    Reference: `ewc_penalty_ref`. Paper: arXiv:1612.00796.
    """
    op = "ewc_penalty"
    require(op, 0 <= strength < math.inf, "strength must be at least 0, got {}", strength)
    lists, _ = prepared(op, {"params": params, "anchors": anchors, "fishers": fishers}, ())
    return _ewc_penalty_fwd(*lists, strength) if lists[0] else torch.zeros(())


def _accumulate(fishers: list[Tensor], grads: list[Tensor], weight: float, decay: float, table: Table | None) -> None:
    if table is None:
        paths.blockwise.fisher_accumulate_((fishers, grads), weight, decay)
    else:
        path_of(fishers[0]).fisher_accumulate_table(table, weight, decay)


@torch.library.custom_op("mmkernels::fisher_accumulate", mutates_args=("fishers",), tags=ADDRESSED)
def _fisher_accumulate(fishers: list[Tensor], grads: list[Tensor], weight: float, decay: float) -> None:
    _accumulate(fishers, grads, weight, decay, table_in_op((fishers, grads)))


@torch.library.custom_op("mmkernels::ewc_penalty_fwd", mutates_args=(), tags=ADDRESSED)
def _ewc_penalty_fwd(params: list[Tensor], anchors: list[Tensor], fishers: list[Tensor], strength: float) -> Tensor:
    lists = (params, anchors, fishers)
    table = table_in_op(lists, "ewc_penalty")
    if table is None:
        return (0.5 * strength * paths.blockwise.ewc_penalty_fwd(lists)).to(total_dtype(lists))
    return (0.5 * strength * path_of(params[0]).ewc_penalty_fwd_table(table)).float()


@_ewc_penalty_fwd.register_fake
def _(params: list[Tensor], anchors: list[Tensor], fishers: list[Tensor], strength: float) -> Tensor:
    return params[0].new_empty((), dtype=total_dtype((params, anchors, fishers)))


@torch.library.custom_op("mmkernels::ewc_penalty_bwd", mutates_args=(), tags=ADDRESSED)
def _ewc_penalty_bwd(
    params: list[Tensor], anchors: list[Tensor], fishers: list[Tensor], d_penalty: Tensor, strength: float
) -> list[Tensor]:
    grads = [torch.empty_like(x) for x in params]
    lists = (params, anchors, fishers, grads)
    table, factor = table_in_op(lists), strength * d_penalty
    if table is None:
        paths.blockwise.ewc_penalty_bwd(lists, factor)
    else:
        path_of(params[0]).ewc_penalty_bwd_table(table, factor.float())
    return grads


@_ewc_penalty_bwd.register_fake
def _(
    params: list[Tensor], anchors: list[Tensor], fishers: list[Tensor], d_penalty: Tensor, strength: float
) -> list[Tensor]:
    return [torch.empty_like(x) for x in params]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    params, anchors, fishers, ctx.strength = inputs
    ctx.save_for_backward(*params, *anchors, *fishers)


def _backward(ctx: Any, d_penalty: Tensor) -> tuple[Any, ...]:
    wanted, saved = ctx.needs_input_grad[0], ctx.saved_tensors
    count = len(wanted)
    chosen = [[saved[i] for i in range(first, first + count) if wanted[i - first]] for first in (0, count, 2 * count)]
    grads = iter(_ewc_penalty_bwd(*chosen, d_penalty, ctx.strength))
    nothing = [None] * count
    return [next(grads) if wants else None for wants in wanted], nothing, nothing, None


_ewc_penalty_fwd.register_autograd(_backward, setup_context=_setup_context)
_ewc_penalty_bwd.register_autograd(has_no_derivative("ewc_penalty", "mmkernels.ewc_penalty_ref"))
