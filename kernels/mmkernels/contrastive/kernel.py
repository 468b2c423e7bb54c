"""Contrastive statistics and their gradient in Triton: logits are recomputed tile by tile and never stored
whole."""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels._launch import chunk_rows, launch, launch_config
from mmkernels._tl import addmm_fp32_, pitched, readable
from mmkernels.contrastive import launches
from mmkernels.contrastive.device import _contrastive_bwd_kernel, _contrastive_fwd_kernel
from mmkernels.contrastive.device_state import UNIT
from mmkernels.contrastive.device_vectors import (
    _contrastive_combine_kernel,
    _contrastive_pairs_grad_kernel,
    _contrastive_weights_kernel,
)
from mmkernels.contrastive.problem import MAX_LOGITS, ContrastiveStats, Problem, add_positives, grad_total, mean_cosine

# Of vectors; with other warps the partial sums spill.
BLOCK, COMBINE_WARPS = 128, 8


def contrastive_fwd(problem: Problem) -> ContrastiveStats:
    """Log-sum-exps, positives and the teacher's expectations of `scale * a b^T`."""
    num_rows, center = len(problem.a), mean_cosine(problem)
    (state,) = launches.workspace(problem.a, launches.state_size(problem.a))
    _write_bounds(problem, state)
    # whole tiles, so that every product is summed as it will be in the backward
    tile = launch_config(launches.TABLE, launches.kinds("fwd", problem)[0], problem.a).block_m
    at_once = max(MAX_LOGITS // max(len(problem.b), 1) // tile, 1) * tile
    parts = []
    for first in range(0, max(num_rows, 1), at_once):
        part = problem if num_rows <= at_once else problem.of_rows(slice(first, first + at_once))
        rows, cols = len(part.a), len(part.b) if part.symmetric else 0
        paired = 0 if part.positives is None else rows
        taught = (rows, cols) if part.teacher else (0, 0)
        sizes = (rows, cols, paired, *taught, rows, cols, *taught, paired)
        parts.append(ContrastiveStats(*(part.a.new_empty(size, dtype=torch.float32) for size in sizes)))
        _statistics(part, parts[-1], state, center)
    return parts[0] if len(parts) == 1 else _joined(parts)


def pair_losses_fwd(a: Tensor, b: Tensor, scale: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """InfoNCE of each pair `[B]`, and the statistics `[6, B]` that its backward needs."""
    kept, losses = a.new_empty(6, len(a), dtype=torch.float32), a.new_empty(len(a), dtype=torch.float32)
    _statistics(Problem(a, b, scale, None, None, None, symmetric), _of_pairs(kept), losses=losses)
    return losses, kept


def _write_bounds(problem: Problem, state: Tensor, *, is_pairs: bool = False) -> None:
    """Where there are two launches, one of which leaves at once."""
    if len(launches.kinds("fwd", problem)) > 1:
        launches.bounds(problem.a, problem.b, state, symmetric=problem.symmetric, is_pairs=is_pairs)


def _of_pairs(kept: Tensor) -> ContrastiveStats:
    row_lse, col_lse, positive, row_rest, col_rest, positive_rest = kept.unbind(0)
    none: Any = None
    return ContrastiveStats(
        row_lse, col_lse, positive, none, none, row_rest, col_rest, none, none, positive_rest=positive_rest
    )


def _statistics(
    problem: Problem,
    stats: ContrastiveStats,
    state: Tensor | None = None,
    center: Tensor | None = None,
    losses: Tensor | None = None,
) -> None:
    """Writes the statistics; with `losses`, those of pairs, the positives being on the diagonal."""
    a, b, has_teacher = problem.a, problem.b, problem.teacher is not None
    (num_rows, width), num_cols, kinds = a.shape, len(b), launches.kinds("fwd", problem)
    is_diagonal, has_positives = losses is not None, losses is not None or problem.positives is not None
    flags = {
        "SYMMETRIC": problem.symmetric,
        "HAS_POSITIVES": has_positives,
        "DIAGONAL": is_diagonal,
        "HAS_TEACHER": has_teacher,
        "ALWAYS": len(kinds) == 1,
        "PARTS": launches.parts(a),
    }
    configs = [launch_config(launches.TABLE, kind, a) for kind in kinds]
    all_tiles = [(triton.cdiv(num_rows, x.block_m), triton.cdiv(num_cols, x.block_n)) for x in configs]
    # the second launch writes where the first one did
    planes = 5 if has_teacher else 2
    sizes = [planes * tiles[0] * tiles[1] for tiles in all_tiles]
    of_tile = [(x.block_m, x.block_n * problem.symmetric) for x in configs]
    row_size, col_size = (max(size * of for size, of in zip(sizes, blocks)) for blocks in zip(*of_tile))
    new_state, product, of_rows, of_cols = launches.workspace(
        a, 0 if state is not None else launches.state_size(a), num_rows * has_positives, row_size, col_size
    )
    if state is None:
        state = new_state
        _write_bounds(problem, state, is_pairs=True)
    for kind, config, tiles in zip(kinds, configs, all_tiles):
        is_exact, num_tiles = kind != "fwd", tiles[0] * tiles[1]
        if num_tiles:
            tensors, strides = launches.operands(problem, config)
            launch(
                _contrastive_fwd_kernel,
                (launches.programs(num_tiles, a, kinds),),
                problem.scale,
                *tensors,
                state,
                center,
                problem.positives,
                problem.exclude,
                of_rows,
                of_cols,
                product,
                *strides,
                num_rows,
                num_cols,
                width,
                EXACT=is_exact,
                HAS_EXCLUDE=problem.exclude is not None,
                **flags,
                **launches.tiling(kind, config, a),
            )
        if num_rows + num_cols:
            launch(
                _contrastive_combine_kernel,
                (triton.cdiv(max(num_rows, num_cols), BLOCK),),
                of_rows,
                of_cols,
                product,
                problem.scale,
                state,
                center,
                problem.positives,
                *stats,
                losses,
                num_rows,
                num_cols,
                *tiles,
                EXACT=is_exact,
                **flags,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK=BLOCK,
                num_warps=COMBINE_WARPS,
            )


def _joined(parts: list[ContrastiveStats]) -> ContrastiveStats:
    """The statistics of all rows, from those of parts of them against the same columns."""
    of_rows = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("row_lse", "positive", "row_cross", "row_rest", "teacher_row_lse", "positive_rest")
    }
    # float64: the rests are what makes them exact
    exact = torch.stack([part.col_lse.double() + part.col_rest for part in parts]).logsumexp(0)
    col_lse = exact.float()
    col_rest = (exact - col_lse).nan_to_num(0.0, 0.0, 0.0).float()
    teacher_lse = torch.stack([part.teacher_col_lse for part in parts])
    shares = teacher_lse.softmax(0)
    crosses = torch.stack([part.col_cross for part in parts])
    # of what sees nothing of a part the expectation there is not a number
    cross = torch.where(shares > 0, shares * crosses, 0.0).sum(0)
    return ContrastiveStats(
        col_lse=col_lse, col_rest=col_rest, col_cross=cross, teacher_col_lse=teacher_lse.logsumexp(0), **of_rows
    )


def contrastive_bwd(
    problem: Problem, stats: ContrastiveStats, grads: list[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `a`, `b` and `scale` (in float32), those that `needs` asks for."""
    state, weight, center, (da, db), of_tiles, _ = _products(problem, stats, grads, (1.0, 1.0), needs)
    unit = state[UNIT.value]
    for dx in (da, db):
        if dx is not None:
            dx.div_(unit)
    of_positives = add_positives(problem, weight[: len(problem.a)] / unit, da, db, center)
    for dx in (da, db):
        if dx is not None:
            dx.mul_(problem.scale)
    if not needs[2]:
        return da, db, None
    return da, db, of_tiles.sum(dtype=torch.float64) + of_positives + center * grad_total(problem, grads)


def pair_losses_bwd(
    a: Tensor, b: Tensor, scale: Tensor, symmetric: bool, kept: Tensor, d_losses: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `a` and `b`, in their dtype, and of `scale`, in float64."""
    problem, share = Problem(a, b, scale, None, None, None, symmetric), 0.5 if symmetric else 1.0
    grads, (num_rows, width) = [d_losses] * 3, a.shape
    state, weight, _, (da, db), of_tiles, num_parts = _products(
        problem, _of_pairs(kept), grads, (share, -1.0), needs, is_pairs=True
    )
    out_a, out_b = (torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
                    for x, needed in zip((a, b), needs))  # fmt: skip
    a, b = readable(a), readable(b)
    launch(
        _contrastive_pairs_grad_kernel,
        (triton.cdiv(num_rows, launches.BLOCK_R),),
        a,
        b,
        da,
        db,
        weight,
        scale,
        state,
        out_a,
        out_b,
        of_tiles,
        a.stride(0),
        b.stride(0),
        num_parts,
        num_rows,
        width,
        NEEDS_A=needs[0],
        NEEDS_B=needs[1],
        BLOCK_R=launches.BLOCK_R,
        BLOCK_D=launches.BLOCK_D,
    )
    return out_a, out_b, of_tiles.sum(dtype=torch.float64) if needs[2] else None


def _products(
    problem: Problem,
    stats: ContrastiveStats,
    grads: Sequence[Tensor],
    shares: tuple[float, float],
    needs: Sequence[bool],
    *,
    is_pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None], Tensor, int]:
    """The state; dL/dS at the positives, in units; the center of the products (of pairs, the state);
    dL/dS b and dL/dS^T a but for the positives, in units; the parts of the sum of dL/dS times the products less their
    center, and how many they are: of pairs as many more are left to be written.

    `shares` of the gradients of the log-sum-exps, and of the positives, are meant.
    """
    a, b, has_teacher = problem.a, problem.b, problem.teacher is not None
    num_rows, num_cols, kinds = len(a), len(b), launches.kinds("bwd", problem)
    d_row, d_col, d_positive = grads[:3]
    has_positives = is_pairs or problem.positives is not None
    taught = (stats.teacher_row_lse, stats.teacher_col_lse, *grads[3:5]) if has_teacher else (None,) * 4
    flags = {
        "SYMMETRIC": problem.symmetric,
        "HAS_POSITIVES": has_positives,
        "DIAGONAL": is_pairs,
        "HAS_TEACHER": has_teacher,
        "ALWAYS": len(kinds) == 1,
        "PARTS": launches.parts(a),
    }
    center = None if is_pairs else mean_cosine(problem)
    config = launch_config(launches.TABLE, kinds[0], a)
    pads = [triton.cdiv(n, size) * size for n, size in ((num_rows, config.block_m), (num_cols, config.block_n))]
    chunk = max(min(chunk_rows(num_cols, a.element_size()), num_rows), 1)
    starts = range(0, num_rows if num_cols else 0, chunk)
    tiles = triton.cdiv(chunk, config.block_m) * triton.cdiv(num_cols, config.block_n)
    programs = launches.programs(tiles, a, kinds)
    num_parts = len(starts) * len(kinds) * programs
    state, row_weights, col_weights, weight, of_tiles = launches.workspace(
        a, launches.state_size(a), *pads, num_rows * has_positives, num_parts + num_rows * is_pairs
    )
    launches.bounds(a, b, state, (d_row, d_col, *taught[2:]), symmetric=problem.symmetric, is_pairs=is_pairs)
    launch(
        _contrastive_weights_kernel,
        (max(triton.cdiv(max(pads), BLOCK), 1),),
        problem.scale,
        state,
        center,
        problem.positives,
        stats.row_lse,
        stats.col_lse,
        stats.positive,
        stats.row_rest,
        stats.col_rest,
        stats.positive_rest,
        d_row,
        d_col,
        d_positive,
        row_weights,
        col_weights,
        weight,
        *shares,
        num_rows,
        num_cols,
        *pads,
        **flags,
        BLOCK=BLOCK,
    )
    lse = stats.row_lse, stats.col_lse, stats.row_rest, stats.col_rest
    vectors = problem.positives, problem.exclude, row_weights, col_weights, *lse, d_row, d_col, *taught, center
    buffer = pitched(a, chunk if needs[0] or needs[1] else 0, num_cols)
    da = a.new_empty(a.shape, dtype=torch.float32) if needs[0] else None
    db = b.new_empty(b.shape, dtype=torch.float32) if needs[1] else None
    for index, first in enumerate(starts):
        rows = slice(first, min(first + chunk, num_rows))
        is_whole = chunk == num_rows
        grad, a_rows = (buffer, a) if is_whole else (buffer[: rows.stop - first], a[rows])
        for place, kind in enumerate(kinds, index * len(kinds)):
            _launch_bwd(problem, kind, programs, place, state, (*vectors, of_tiles), grad, rows, flags)
        if da is not None:
            addmm_fp32_(da if is_whole else da[rows], grad, b, beta=0.0)
        if db is not None:
            addmm_fp32_(db, grad.T, a_rows, beta=float(first > 0))
    if not starts:
        for dx in (da, db):
            if dx is not None:
                dx.zero_()
    return state, weight, state if center is None else center, [da, db], of_tiles, num_parts


def _launch_bwd(
    problem: Problem,
    kind: str,
    programs: int,
    place: int,
    state: Tensor,
    vectors: Sequence[Tensor | None],
    grad: Tensor,
    rows: slice,
    flags: dict[str, bool],
) -> None:
    """Writes dL/dS of some rows into `grad`, and of the `place`-th launch each program's sum into the last vector."""
    a, b = problem.a, problem.b
    config, has_grad = launch_config(launches.TABLE, kind, a), grad.numel() > 0
    tensors, strides = launches.operands(problem, config)
    tiling = launches.tiling(kind, config, a)
    stored: Any = grad
    if has_grad and tiling["DESCRIBED"]:
        width = config.block_n // 2 if tiling["IN_HALVES"] else config.block_n
        stored = TensorDescriptor(grad, list(grad.shape), list(grad.stride()), [config.block_m, width])
    launch(
        _contrastive_bwd_kernel,
        (programs,),
        problem.scale,
        *tensors,
        stored if has_grad else None,
        state,
        *vectors,
        *strides,
        grad.stride(0),
        place * programs,
        rows.stop,
        len(b),
        a.shape[1],
        rows.start,
        EXACT=kind != "bwd",
        HAS_GRAD=has_grad,
        HAS_EXCLUDE=problem.exclude is not None,
        **flags,
        **tiling,
    )
