"""What the launches of both passes share: their table, their operands, and the bounds that their kernels go by."""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels._launch import Launch, Table, launch, processors, tile_flags
from mmkernels._tl import is_described, readable, tile_operand
from mmkernels.contrastive.device_state import FIRST, MAXIMA, _contrastive_bounds_kernel
from mmkernels.contrastive.problem import Problem

# As many are some tiles for each processor: what two launches more would cost takes longer.
FEW_LOGITS = 1024 * 1024
# Rows and elements of features at a time.
BLOCK_R, BLOCK_D = 16, 128

TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 256, 64, 8, 3),
    ("fwd", 2, 100): Launch(128, 128, 64, 8, 3),
    ("bwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("bwd", 2, 90): Launch(128, 256, 64, 8, 3),
    ("bwd", 2, 100): Launch(128, 128, 64, 8, 3),
    # where no shift serves, and of float32, whose products take longer than any exponential
    ("fwd_exact", 2, 80): Launch(128, 128, 32, 8, 3),
    ("fwd_exact", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd_exact", 2, 100): Launch(64, 64, 64, 4, 3),
    ("fwd_exact", 4, 80): Launch(64, 64, 16, 8, 3),
    ("fwd_exact", 4, 90): Launch(64, 64, 16, 8, 3),
    ("fwd_exact", 4, 100): Launch(64, 64, 16, 4, 3),
    ("bwd_exact", 2, 80): Launch(128, 128, 32, 8, 3),
    ("bwd_exact", 2, 90): Launch(128, 128, 64, 8, 3),
    ("bwd_exact", 2, 100): Launch(64, 64, 64, 4, 3),
    ("bwd_exact", 4, 80): Launch(64, 64, 16, 8, 3),
    ("bwd_exact", 4, 90): Launch(64, 64, 16, 8, 3),
    ("bwd_exact", 4, 100): Launch(64, 64, 16, 8, 3),
    # two products a tile: two accumulators
    ("fwd_teacher", 2, 80): Launch(64, 64, 32, 8, 3),
    ("fwd_teacher", 2, 90): Launch(64, 64, 64, 8, 3),
    ("fwd_teacher", 2, 100): Launch(64, 64, 64, 4, 3),
    ("fwd_teacher", 4, 80): Launch(64, 32, 16, 8, 3),
    ("fwd_teacher", 4, 90): Launch(64, 32, 16, 8, 3),
    ("fwd_teacher", 4, 100): Launch(64, 32, 16, 8, 3),
    ("bwd_teacher", 2, 80): Launch(64, 64, 32, 8, 3),
    ("bwd_teacher", 2, 90): Launch(64, 64, 64, 8, 3),
    ("bwd_teacher", 2, 100): Launch(64, 64, 64, 4, 3),
    ("bwd_teacher", 4, 80): Launch(64, 32, 16, 4, 3),
    ("bwd_teacher", 4, 90): Launch(64, 32, 16, 4, 3),
    ("bwd_teacher", 4, 100): Launch(64, 32, 16, 4, 3),
}


def state_size(x: Tensor) -> int:
    return FIRST.value + MAXIMA * parts(x)


def workspace(like: Tensor, *sizes: int) -> Sequence[Tensor]:
    """Float32 vectors in one allocation, all but the last a little longer than asked for: each begins aligned."""
    rounded = [-(-size // 32) * 32 for size in sizes[:-1]] + [sizes[-1]]
    return like.new_empty(sum(rounded), dtype=torch.float32).split(rounded)


def bounds(
    a: Tensor, b: Tensor, state: Tensor, grads: Sequence[Tensor | None] = (), *, symmetric: bool, is_pairs: bool
) -> None:
    """Writes the state that a call's kernels share: the bounds on its logits and on the gradients of its statistics."""
    d_row, d_col, teacher_d_row, teacher_d_col = grads or (None,) * 4
    a, b = readable(a), readable(b)
    launch(
        _contrastive_bounds_kernel,
        (parts(a),),
        a,
        b,
        d_row,
        d_col,
        teacher_d_row,
        teacher_d_col,
        state,
        a.stride(0),
        b.stride(0),
        len(a),
        len(b),
        a.shape[1],
        HAS_GRAD=d_row is not None,
        SYMMETRIC=symmetric,
        HAS_TEACHER=teacher_d_row is not None,
        PAIRS=is_pairs,
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_D,
    )


def parts(x: Tensor) -> int:
    """Programs that look for the largest of rows, a power of two: about as many as run at a time."""
    return 128 if x.is_cuda else 2


def kinds(which: str, problem: Problem) -> tuple[str, ...]:
    """The launches, by their rows of the table: of two of them one leaves at once. Of float32 and of few logits the
    exponentials are the least of it."""
    if problem.teacher is not None:
        return (f"{which}_teacher",)
    is_small = problem.a.is_cuda and len(problem.a) * len(problem.b) <= FEW_LOGITS
    return (f"{which}_exact",) if is_small or problem.a.element_size() == 4 else (which, f"{which}_exact")


def programs(num_tiles: int, x: Tensor, kinds: tuple[str, ...]) -> int:
    """As many as run at a time, each of several tiles, where a launch may have to leave at once."""
    return num_tiles if len(kinds) == 1 else min(num_tiles, processors(x))


def operands(problem: Problem, config: Launch) -> tuple[list[Any], tuple[int, ...]]:
    """a, b and the teacher's as the kernels read them, and the strides of their rows."""
    given = (problem.a, problem.b, problem.teacher_a, problem.teacher_b)
    sizes = (config.block_m, config.block_n) * 2
    read = [None if x is None else tile_operand(x, size, config) for x, size in zip(given, sizes)]
    strides = (0 if x is None else x.strides[0] if isinstance(x, TensorDescriptor) else x.stride(0) for x in read)
    return read, tuple(strides)


def tiling(kind: str, config: Launch, x: Tensor) -> dict[str, Any]:
    described = is_described(x)
    return {
        "DESCRIBED": described,
        # the interpreter takes the way of the largest tile
        "IN_HALVES": described and kind in ("fwd", "bwd") and (config.block_n == 256 or not x.is_cuda),
        **tile_flags(config),
    }
