"""The exponential moving average of lists of tensors in one launch, checked and registered with torch."""

import math
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from mmkernels._checks import require
from mmkernels.multi_tensor import paths
from mmkernels.multi_tensor.paths import ADDRESSED, check_captured, path_of, prepared, scalar, table_in_op
from mmkernels.multi_tensor.table import Table, dtypes_of

# From these decays on an update of a teacher in half precision is mostly below half of its last place, and lost.
STALLS = {torch.bfloat16: 0.99, torch.float16: 0.999}
ROUNDINGS = (None, "stochastic")


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    *,
    shadows: Sequence[Tensor] | None = None,
    rounding: str | None = None,
    seed: int | Tensor = 0,
) -> None:
    """`target = decay target + (1 - decay) source` of every tensor, in place and in one launch.

    Computed in float32 (float64 where a target is float64), whatever the dtypes; lists may mix dtypes and sizes.

    Args:
        targets: the averages, distinct tensors of one device, float32, float16, bfloat16 or float64, any shapes;
            dense (contiguous, or permuted from it).
        sources: what is averaged, the shapes and device of `targets`, of any of these dtypes, in memory of their
            own; where their strides differ, a source is copied first.
        decay: from 0 to 1; a float, or a tensor of one element on the device, which a captured graph reads anew
            (on a GPU it is not checked) and has to be given.
        shadows: written with the new averages, like `targets` but for their dtypes; None = none.
        rounding: None = to nearest; "stochastic" rounds targets in bfloat16 up or down at random, so that their
            mean follows what updates too small for their last place add up to.
        seed: of that, an int or, in a captured graph, an int64 tensor `[]` on the device; another for each update.

    Raises:
        ValueError: lists that do not match, a dtype, a device or a decay; targets in half precision at a decay
            that would stall them (bfloat16 from 0.99, float16 from 0.999): average in float32 with `shadows`, or
            round stochastically.

    Reference: `ema_update_ref_`. Papers: arXiv:1911.05722 (MoCo), arXiv:1703.01780 (mean teacher).
    """
    op = "ema_update_"
    require(op, rounding in ROUNDINGS, "rounding must be one of {}, got {!r}", ROUNDINGS, rounding)
    given = {"targets": targets, "sources": sources, "shadows": shadows}
    lists, table = prepared(op, given, ("targets", "shadows"))
    if not lists[0]:
        return
    dtypes = {x.dtype for x in lists[0]} if table is None else dtypes_of(table, 0)
    _check_decay(op, decay, dtypes, rounding)
    check_captured(op, lists[0][0], decay=decay, **({"seed": seed} if rounding == "stochastic" else {}))
    device = lists[0][0].device
    weight = (1 - scalar(decay, torch.float64, device)).reshape(())
    key = scalar(seed, torch.int64, device) if rounding == "stochastic" else None
    if torch.compiler.is_compiling():
        _ema_update(*lists, weight, key)
    else:
        # a call of the registered op would take longer than ten thousand small tensors
        _update(lists, weight, key, table)
        torch.autograd.graph.increment_version([*lists[0], *lists[2]])


def _check_decay(op: str, decay: float | Tensor, dtypes: Set[torch.dtype | None], rounding: str | None) -> None:
    if rounding == "stochastic":
        wrong = dtypes - {torch.bfloat16}
        require(op, not wrong, "rounding must be None for targets other than bfloat16, got them in {}", wrong)
    if isinstance(decay, Tensor):
        require(op, decay.numel() == 1, "decay must be one number, got shape {}", list(decay.shape))
        if not decay.is_cpu or torch.compiler.is_compiling():
            half = dtypes & set(STALLS) if rounding is None else set()
            require(op, not half, "decay must be a float for targets in {}, got a tensor on a GPU", half)
            return
        decay = decay.item()
    in_range = math.isfinite(decay) and 0 <= decay <= 1
    require(op, in_range, "decay must be from 0 to 1, got {}", decay)
    for dtype, most in STALLS.items():
        stalls = rounding is None and dtype in dtypes and most <= decay < 1
        require(op, not stalls, "decay must be below {} for targets in {}, got {}", most, dtype, decay)


def _update(lists: Sequence[list[Tensor]], weight: Tensor, seed: Tensor | None, table: Table | None) -> None:
    if table is None:
        paths.blockwise.ema_update_(lists, weight, seed)
    else:
        path_of(lists[0][0]).ema_update_table(table, weight.float(), seed)


@torch.library.custom_op("mmkernels::ema_update", mutates_args=("targets", "shadows"), tags=ADDRESSED)
def _ema_update(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], weight: Tensor, seed: Tensor | None
) -> None:
    lists = (targets, sources, shadows)
    _update(lists, weight, seed, table_in_op(lists))
