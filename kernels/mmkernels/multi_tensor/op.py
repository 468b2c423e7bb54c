"""Updates of lists of tensors in one launch, checked and registered with torch."""

import math
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from mmkernels import native
from mmkernels._checks import check_dtype, require
from mmkernels._device import HAS_TRITON, runs_triton
from mmkernels.multi_tensor import blockwise
from mmkernels.multi_tensor.table import DTYPES, Table, dtypes_of, known, table_of

if HAS_TRITON:
    from mmkernels.multi_tensor import kernel
else:
    kernel = blockwise

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
        sources: what is averaged, the shapes and device of `targets`, of any of these dtypes; where their strides
            differ, a source is copied first.
        decay: from 0 to 1; a float, or a tensor of one element on the device, which a captured graph reads anew
            (on a GPU it is not checked).
        shadows: written with the new averages, like `targets` but for their dtypes; None = none.
        rounding: None = to nearest; "stochastic" rounds targets in bfloat16 up or down at random, so that their
            mean follows what updates too small for their last place add up to.
        seed: of that, an int or an int64 tensor `[]` on the device; another for each update.

    Raises:
        ValueError: lists that do not match, a dtype, a device or a decay; targets in half precision at a decay
            that would stall them (bfloat16 from 0.99, float16 from 0.999): average in float32 with `shadows`, or
            round stochastically.

    Reference: `ema_update_ref_`. Papers: arXiv:1911.05722 (MoCo), arXiv:1703.01780 (mean teacher).
    """
    op = "ema_update_"
    lists = [list(targets), list(sources), [] if shadows is None else list(shadows)]
    require(op, rounding in ROUNDINGS, "rounding must be one of {}, got {!r}", ROUNDINGS, rounding)
    is_walked = not torch.compiler.is_compiling() and any(walks(x) for x in lists[0][:1])
    table = known(lists) if is_walked else None
    if table is None:
        written = {"targets": lists[0]} | ({} if shadows is None else {"shadows": lists[2]})
        check_lists(op, written, {"sources": lists[1]})
        if not lists[0]:
            return
        lists[1] = [laid_out(source, target) for source, target in zip(lists[1], lists[0], strict=True)]
        table = table_of(lists) if is_walked and has_dtypes(lists) else None
    dtypes = {x.dtype for x in lists[0]} if table is None else dtypes_of(table, 0)
    _check_decay(op, decay, dtypes, rounding)
    device = lists[0][0].device
    exact = torch.as_tensor(decay, dtype=torch.float64, device=device)
    key = torch.as_tensor(seed, device=device) if rounding == "stochastic" else None
    weight = (1 - exact).reshape(())
    if torch.compiler.is_compiling():
        _ema_update(*lists, weight, key)
    else:
        # a call of the registered op would take longer than ten thousand small tensors
        _update(lists, weight, key, table)
        torch.autograd.graph.increment_version([*lists[0], *lists[2]])


def check_lists(op: str, written: dict[str, list[Tensor]], read: dict[str, list[Tensor]]) -> None:
    """Tensors of one device, of known dtypes, the n-th of all lists of equal shapes; those that are written are dense,
    in equal strides, and those of the first list distinct."""
    (name, first), *_ = written.items()
    lists = written | read
    for other, tensors in lists.items():
        length = len(tensors) == len(first)
        require(op, length, "{} must be {} tensors like {}, got {}", other, len(first), name, len(tensors))
    if not first:
        return
    if not torch.compiler.is_compiling():
        places = [x.data_ptr() for x in first if x.numel()]
        is_distinct = len(set(places)) == len(places)
        require(op, is_distinct, "{} must be distinct tensors, got {}", name, "some twice")
    device = first[0].device
    for label, tensors in lists.items():
        for i, (x, like) in enumerate(zip(tensors, first, strict=True)):
            check_dtype(op, f"{label}[{i}]", x)
            if not torch.compiler.is_compiling():
                holds = x.numel() == 0 or x.data_ptr() != 0
                require(
                    op, holds, "{}[{}] must hold its elements, got {}", label, i, "a tensor that was freed"
                )
            require(op, x.device == device, "{}[{}] must be on {}, got {}", label, i, device, x.device)
            shape = x.shape == like.shape
            require(op, shape, "{}[{}] must be {}, got {}", label, i, list(like.shape), list(x.shape))
            if label in written and not (x.is_contiguous() and like.is_contiguous()):
                dense = x.stride() == like.stride() and is_dense(x)
                want = list(like.stride())
                require(
                    op, dense, "{}[{}] must be dense in strides {}, got {}", label, i, want, list(x.stride())
                )


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` with each element where `like`, which is dense, has it; a copy where it must be."""
    if x.stride() == like.stride() or (x.is_contiguous() and like.is_contiguous()):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, each in a place of its own."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_decay(
    op: str, decay: float | Tensor, dtypes: Set[torch.dtype | None], rounding: str | None
) -> None:
    if rounding == "stochastic":
        wrong = dtypes - {torch.bfloat16}
        require(op, not wrong, "rounding must be None for targets other than bfloat16, got them in {}", wrong)
    if isinstance(decay, Tensor):
        require(op, decay.numel() == 1, "decay must be one number, got shape {}", list(decay.shape))
        if decay.device.type != "cpu" or torch.compiler.is_compiling():
            half = dtypes & set(STALLS) if rounding is None else set()
            require(op, not half, "decay must be a float for targets in {}, got a tensor on a GPU", half)
            return
        decay = decay.item()
    in_range = math.isfinite(decay) and 0 <= decay <= 1
    require(op, in_range, "decay must be from 0 to 1, got {}", decay)
    for dtype, most in STALLS.items():
        stalls = rounding is None and dtype in dtypes and most <= decay < 1
        require(op, not stalls, "decay must be below {} for targets in {}, got {}", most, dtype, decay)


def walks(x: Tensor) -> bool:
    """Whether a kernel walks lists on the device of `x`: on a GPU Triton's, on a CPU the native one."""
    return runs_triton(x) or (x.is_cpu and native.AVAILABLE)


def has_dtypes(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the kernels know the dtypes: all but float64."""
    return {x.dtype for tensors in lists for x in tensors} <= set(DTYPES)


def _update(lists: Sequence[list[Tensor]], weight: Tensor, seed: Tensor | None, table: Table | None) -> None:
    if table is None:
        blockwise.ema_update_(lists, weight, seed)
    else:
        path = kernel if runs_triton(lists[0][0]) else blockwise
        path.ema_update_table(table, weight.float(), seed)


@torch.library.custom_op("mmkernels::ema_update", mutates_args=("targets", "shadows"))
def _ema_update(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], weight: Tensor, seed: Tensor | None
) -> None:
    lists = (targets, sources, shadows)
    is_walked = walks(targets[0]) and has_dtypes(lists)
    _update(lists, weight, seed, table_of(lists) if is_walked else None)
