"""Contrastive statistics and their gradient in Triton: logits are recomputed tile by tile and never stored
whole."""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mmkernels._launch import MAX_PROGRAMS, Launch, Table, chunk_rows, input_precision, launch, launch_config
from mmkernels._numerics import combine_sums
from mmkernels._tl import addmm_fp32_, operand, pitched
from mmkernels.contrastive.device import _contrastive_bwd_kernel, _contrastive_fwd_kernel
from mmkernels.contrastive.problem import (
    Coefficients,
    ContrastiveStats,
    Problem,
    add_positives,
    coefficients,
    grad_total,
    mean_cosine,
    shift_of,
)

# dL/dS is stored in the operands' dtype, its largest possible entry moved here: float16 then keeps 28 binades
# below it.
GRAD_CEILING = 2.0**14
# Planes of partial sums: of exp(S - max) the maximum and the sum; of the teacher's the expectation of S too.
MAX, SUM, TEACHER_MAX, TEACHER_SUM, TEACHER_CROSS = range(5)

TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 128, 32, 8, 4),
    ("fwd", 2, 100): Launch(64, 128, 64, 8, 3),
    ("fwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 100): Launch(128, 64, 16, 8, 3),
    ("bwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("bwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("bwd", 2, 100): Launch(128, 64, 64, 8, 3),
    ("bwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("bwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("bwd", 4, 100): Launch(128, 64, 16, 8, 3),
    # two products a tile: two accumulators
    ("fwd_teacher", 2, 80): Launch(64, 64, 32, 8, 3),
    ("fwd_teacher", 2, 90): Launch(64, 64, 64, 8, 3),
    ("fwd_teacher", 2, 100): Launch(64, 64, 32, 8, 3),
    ("fwd_teacher", 4, 80): Launch(64, 32, 16, 8, 3),
    ("fwd_teacher", 4, 90): Launch(64, 32, 16, 8, 3),
    ("fwd_teacher", 4, 100): Launch(64, 32, 16, 8, 3),
    ("bwd_teacher", 2, 80): Launch(64, 64, 32, 4, 3),
    ("bwd_teacher", 2, 90): Launch(64, 64, 64, 4, 3),
    ("bwd_teacher", 2, 100): Launch(64, 64, 64, 8, 3),
    ("bwd_teacher", 4, 80): Launch(64, 32, 16, 4, 3),
    ("bwd_teacher", 4, 90): Launch(64, 32, 16, 4, 3),
    ("bwd_teacher", 4, 100): Launch(64, 32, 16, 4, 3),
}


def contrastive_fwd(problem: Problem) -> ContrastiveStats:
    """Log-sum-exps, positives and the teacher's expectations of `scale * a b^T`."""
    a, b, positives = problem.a, problem.b, problem.positives
    num_rows, num_cols = a.shape[0], b.shape[0]
    config = launch_config(TABLE, "fwd_teacher" if problem.teacher else "fwd", a)
    programs = min(triton.cdiv(num_rows, config.block_m), MAX_PROGRAMS)
    col_tiles = max(triton.cdiv(num_cols, config.block_n), 1)
    # few rows alone would leave processors idle: cut the columns as well
    tiles_per_split = triton.cdiv(col_tiles, min(max(MAX_PROGRAMS // max(programs, 1), 1), col_tiles))
    splits = triton.cdiv(col_tiles, tiles_per_split)
    planes = 5 if problem.teacher else 2
    of_rows = a.new_empty(planes, splits, num_rows, dtype=torch.float32)
    of_cols = pitched(
        a.new_empty(0, dtype=torch.float32), planes * programs, num_cols if problem.symmetric else 0
    ).unflatten(0, (planes, programs))
    # not a number where a positive is out of range, and so never found
    positive = a.new_empty(0, dtype=torch.float32)
    if positives is not None:
        positive = torch.where(positives == -1, 0.0, torch.nan).to(torch.float32)
    shift = shift_of(problem.scale)
    if num_rows:
        operands, strides = _operands(problem, config)
        launch(
            _contrastive_fwd_kernel,
            (programs, splits),
            *operands,
            problem.scale,
            shift,
            positives,
            of_rows,
            of_cols,
            positive,
            *strides,
            of_cols.stride(0) // programs,
            num_rows,
            num_cols,
            operands[0].shape[1],
            tiles_per_split * config.block_n,
            SYMMETRIC=problem.symmetric,
            HAS_POSITIVES=positives is not None,
            HAS_TEACHER=problem.teacher is not None,
            SHIFTED=problem.normalized,
            **_tiling(config),
        )
    if problem.normalized:
        of_rows[MAX], of_cols[MAX] = shift, shift
    row_lse, row_rest = combine_sums(of_rows[MAX], of_rows[SUM])
    col_lse, col_rest = combine_sums(of_cols[MAX], of_cols[SUM])
    row_cross, teacher_row_lse = _expectation(of_rows)
    col_cross, teacher_col_lse = _expectation(of_cols)
    return ContrastiveStats(
        row_lse, col_lse, positive, row_cross, col_cross, row_rest, col_rest, teacher_row_lse, teacher_col_lse
    )


def contrastive_bwd(
    problem: Problem, stats: ContrastiveStats, grads: list[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `a` (in its dtype), `b` and `scale` (in float32), those that `needs` asks for."""
    a, b = problem.a, problem.b
    needs_a, needs_b, needs_scale = needs
    num_rows, num_cols = a.shape[0], b.shape[0]
    coefs = coefficients(problem, stats, grads)
    ceilings = [x.abs().amax() for x in (coefs.row, coefs.col, coefs.teacher_row, coefs.teacher_col) if len(x)]
    unit = GRAD_CEILING / torch.stack([*ceilings, coefs.row.new_zeros(())]).sum().clamp(1e-30)
    in_units = Coefficients(*(x * unit for x in coefs))
    chunk = max(min(chunk_rows(num_cols, a.element_size()), num_rows), 1)
    grad = pitched(a, chunk if needs_a or needs_b else 0, num_cols)
    da = a.new_empty(a.shape, dtype=torch.float32) if needs_a else None
    db = b.new_zeros(b.shape, dtype=torch.float32) if needs_b else None
    center, dscale = mean_cosine(problem), [unit.new_zeros(1)]
    for first in range(0, num_rows, chunk):
        rows = slice(first, first + chunk)
        dscale.append(_grad_chunk(problem, stats, in_units, rows, center, grad, needs_scale))
        part = grad[: len(a[rows])]
        if da is not None:
            addmm_fp32_(da[rows], part, b, beta=0.0)
        if db is not None:
            addmm_fp32_(db, part.T, a[rows])
    for dx in (da, db):
        if dx is not None:
            dx.div_(unit)
    of_positives = add_positives(problem, coefs, da, db, center)
    for dx in (da, db):
        if dx is not None:
            dx.mul_(problem.scale)
    if not needs_scale:
        return da, db, None
    return da, db, torch.cat(dscale).sum() / unit + of_positives + center * grad_total(grads)


def _grad_chunk(
    problem: Problem,
    stats: ContrastiveStats,
    coefs: Coefficients,
    rows: slice,
    center: Tensor,
    out: Tensor,
    needs_scale: bool,
) -> Tensor:
    """Write dL/dS of some rows, zero at the positives, into `out`; returns partials of the scale's."""
    has_teacher = problem.teacher is not None
    part = problem.of_rows(rows)
    config = launch_config(TABLE, "bwd_teacher" if has_teacher else "bwd", part.a)
    num_rows, num_cols = part.a.shape[0], part.b.shape[0]
    grid = (triton.cdiv(num_rows, config.block_m), triton.cdiv(num_cols, config.block_n))
    operands, strides = _operands(part, config)
    dscale = out.new_empty(grid[1] * num_rows if needs_scale else 0, dtype=torch.float32)
    launch(
        _contrastive_bwd_kernel,
        grid,
        *operands,
        part.scale,
        part.positives,
        stats.row_lse[rows],
        stats.col_lse,
        coefs.row[rows],
        coefs.col,
        stats.teacher_row_lse[rows],
        stats.teacher_col_lse,
        coefs.teacher_row[rows],
        coefs.teacher_col,
        center,
        out,
        dscale,
        *strides,
        out.stride(0),
        num_rows,
        num_cols,
        operands[0].shape[1],
        SYMMETRIC=problem.symmetric,
        HAS_POSITIVES=part.positives is not None,
        HAS_TEACHER=has_teacher,
        HAS_GRAD=out.numel() > 0,
        HAS_DSCALE=needs_scale,
        **_tiling(config),
    )
    return dscale


def _operands(problem: Problem, config: Launch) -> tuple[list[Tensor], tuple[int, ...]]:
    """a, b and the teacher's as the kernels read them (theirs again where there is no teacher), and strides."""
    a, b = operand(problem.a, config.block_d), operand(problem.b, config.block_d)
    teacher_a, teacher_b = (a, b) if problem.teacher is None else (operand(x, config.block_d) for x in problem.teacher)
    return [a, b, teacher_a, teacher_b], (*a.stride(), *b.stride(), teacher_a.stride(0), teacher_b.stride(0))


def _tiling(config: Launch) -> dict[str, int | str]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "INPUT_PRECISION": input_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _expectation(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's expectation and its log-sum-exp from partials `[planes, parts, size]`; empty without one."""
    if len(sums) == 2:
        return sums.new_empty(0), sums.new_empty(0)
    maxima, totals, crosses = sums[TEACHER_MAX], sums[TEACHER_SUM], sums[TEACHER_CROSS]
    if not sums.shape[1]:
        return totals.sum(0), totals.sum(0)
    largest = maxima.amax(0)
    shrink = (maxima - largest).exp()
    total = (totals * shrink).sum(0)
    return (crosses * shrink).sum(0) / total, largest + total.log()
