"""Contrastive statistics and their gradient in Triton: logits are recomputed tile by tile and never stored
whole.

Pass 1 reads each tile once for both directions: row sums stay in registers, column sums go to a row of
partials that the program owns. Pass 2 writes dL/dS for a chunk of rows and leaves the two products to the
GEMM library.
"""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._launch import input_precision, launch_config
from mmkernels._numerics import combine_sums
from mmkernels._tl import dot_tile, matmul_fp32, operand, pitched
from mmkernels.contrastive.blockwise import Stats, coefficients, grad_total, mean_cosine
from mmkernels.contrastive.launch import MAX_PROGRAMS, TABLE, chunk_rows

# dL/dS is stored in the operands' dtype, its largest possible entry moved here: float16 then keeps 28 binades
# below it.
GRAD_CEILING = 2.0**14


@triton.jit
def _contrastive_fwd_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    row_max_ptr,  # [splits, M]
    row_sum_ptr,
    col_max_ptr,  # [programs, N]
    col_sum_ptr,
    positive_ptr,  # [M]
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_cp,
    M,
    N,
    D,
    offset,
    cols_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr).to(tl.float32)
    first_n = pid_n * cols_per_split
    last_n = tl.minimum(first_n + cols_per_split, N)
    row_base = pid_n.to(tl.int64) * M
    col_base = pid_m.to(tl.int64) * stride_cp
    for start_m in range(pid_m * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start_n in range(first_n, last_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < last_n
            acc = dot_tile(
                a_ptr,
                b_ptr,
                stride_am,
                stride_ad,
                stride_bn,
                stride_bd,
                offs_m,
                offs_n,
                M,
                N,
                D,
                BLOCK_D,
                INPUT_PRECISION,
            )
            logits = acc * scale

            if (start_m + offset < start_n + BLOCK_N) & (start_n < start_m + offset + BLOCK_M):
                is_positive = offs_n[None, :] == offs_m[:, None] + offset
                found = mask_m & (offs_m + offset >= start_n) & (offs_m + offset < start_n + BLOCK_N)
                tl.store(positive_ptr + offs_m, tl.sum(tl.where(is_positive, logits, 0.0), 1), mask=found)

            of_col = tl.where(mask_m[:, None], logits, float("-inf"))
            tile_max = tl.max(of_col, 0)
            tile_sum = tl.sum(tl.exp(of_col - tile_max[None, :]), 0)
            # the program's own column sums: what it stored one row tile ago, nothing before its first
            seen = mask_n & (start_m >= tl.num_programs(0) * BLOCK_M)
            old_max = tl.load(col_max_ptr + col_base + offs_n, mask=seen, other=float("-inf"))
            old_sum = tl.load(col_sum_ptr + col_base + offs_n, mask=seen, other=0.0)
            new_max = tl.maximum(old_max, tile_max)
            col_sum = old_sum * tl.exp(old_max - new_max) + tile_sum * tl.exp(tile_max - new_max)
            # no thread may overwrite a sum that another has still to read, nor read one not yet written
            tl.debug_barrier()
            tl.store(col_max_ptr + col_base + offs_n, new_max, mask=mask_n)
            tl.store(col_sum_ptr + col_base + offs_n, col_sum, mask=mask_n)
            tl.debug_barrier()

            of_row = tl.where(mask_n[None, :], logits, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(of_row, 1))
            row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(of_row - new_max[:, None]), 1)
            row_max = new_max
        tl.store(row_max_ptr + row_base + offs_m, row_max, mask=mask_m)
        tl.store(row_sum_ptr + row_base + offs_m, row_sum, mask=mask_m)


@triton.jit
def _contrastive_bwd_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    row_lse_ptr,
    col_lse_ptr,
    row_coef_ptr,
    col_coef_ptr,
    positive_coef_ptr,
    center_ptr,
    grad_ptr,  # [chunk, N]
    dscale_ptr,  # [column tiles, M]
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_gm,
    M,
    N,
    D,
    offset,
    HAS_GRAD: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr).to(tl.float32)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = dot_tile(
        a_ptr,
        b_ptr,
        stride_am,
        stride_ad,
        stride_bn,
        stride_bd,
        offs_m,
        offs_n,
        M,
        N,
        D,
        BLOCK_D,
        INPUT_PRECISION,
    )
    logits = acc * scale
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=0.0)
    row_coef = tl.load(row_coef_ptr + offs_m, mask=mask_m, other=0.0)
    grad = tl.exp(logits - row_lse[:, None]) * row_coef[:, None]
    col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=0.0)
    col_coef = tl.load(col_coef_ptr + offs_n, mask=mask_n, other=0.0)
    grad += tl.exp(logits - col_lse[None, :]) * col_coef[None, :]
    inside = mask_m[:, None] & mask_n[None, :]
    is_positive = offs_n[None, :] == offs_m[:, None] + offset
    if HAS_GRAD:
        grad_ptrs = grad_ptr + offs_m.to(tl.int64)[:, None] * stride_gm + offs_n[None, :]
        # the positive's share is added in float32 by the caller
        stored = tl.where(is_positive, 0.0, grad).to(grad_ptr.dtype.element_ty)
        # up to the pitch, not N: whole vectors; what lies between is never read
        tl.store(grad_ptrs, stored, mask=mask_m[:, None] & (offs_n < stride_gm)[None, :])
    if HAS_DSCALE:
        positive_coef = tl.load(positive_coef_ptr + offs_m, mask=mask_m, other=0.0)
        grad = tl.where(is_positive, positive_coef[:, None], grad)
        partial = tl.sum(tl.where(inside, grad * (acc - tl.load(center_ptr)), 0.0), 1)
        tl.store(dscale_ptr + pid_n.to(tl.int64) * M + offs_m, partial, mask=mask_m)


def contrastive_fwd(a: Tensor, b: Tensor, scale: Tensor, offset: int) -> Stats:
    """Row and column log-sum-exp and the positives of `scale * a b^T`, then the two sums' rounding errors."""
    num_rows, num_cols = a.shape[0], b.shape[0]
    config = launch_config(TABLE, "fwd", a)
    a, b = operand(a, config.block_d), operand(b, config.block_d)
    programs = min(triton.cdiv(num_rows, config.block_m), MAX_PROGRAMS)
    col_tiles = max(triton.cdiv(num_cols, config.block_n), 1)
    # few rows alone would leave processors idle: cut the columns as well
    tiles_per_split = triton.cdiv(col_tiles, min(max(MAX_PROGRAMS // max(programs, 1), 1), col_tiles))
    splits = triton.cdiv(col_tiles, tiles_per_split)
    of_rows = a.new_empty(2, splits, num_rows, dtype=torch.float32)
    of_cols = pitched(a.new_empty(0, dtype=torch.float32), 2 * programs, num_cols).unflatten(0, (2, programs))
    positive = a.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        _contrastive_fwd_kernel[(programs, splits)](
            a,
            b,
            scale,
            *of_rows,
            *of_cols,
            positive,
            *a.stride(),
            *b.stride(),
            of_cols.stride(1),
            num_rows,
            num_cols,
            a.shape[1],
            offset,
            tiles_per_split * config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            INPUT_PRECISION=input_precision(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    row_lse, row_rest = combine_sums(*of_rows)
    col_lse, col_rest = combine_sums(*of_cols)
    return row_lse, col_lse, positive, row_rest, col_rest


def contrastive_bwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    stats: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    offset: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `a` (in its dtype), `b` and `scale` (in float32), those that `needs` asks for."""
    needs_a, needs_b, needs_scale = needs
    num_rows, num_cols = a.shape[0], b.shape[0]
    row_coef, col_coef, positive_coef = coefficients(stats, grads, offset)
    coef = positive_coef[:, None]
    ceiling = row_coef.abs().amax() + col_coef.abs().amax() if num_rows else coef.new_ones(())
    unit = GRAD_CEILING / ceiling.clamp(1e-30)
    chunk = max(min(chunk_rows(num_cols, a.element_size()), num_rows), 1)
    grad = pitched(a, chunk if needs_a or needs_b else 0, num_cols)
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if needs_a else None
    db = b.new_zeros(b.shape, dtype=torch.float32) if needs_b else None
    center, dscale = mean_cosine(a, b), []
    for first in range(0, num_rows, chunk):
        rows = slice(first, first + chunk)
        dscale.append(
            _grad_chunk(
                a[rows],
                b,
                scale,
                (stats[0][rows], stats[1]),
                (row_coef[rows] * unit, col_coef * unit, positive_coef[rows] * unit, center),
                first + offset,
                grad,
                needs_scale,
            )
        )
        part = grad[: len(a[rows])]
        if da is not None:
            product = matmul_fp32(part, b).div_(unit)
            product.addcmul_(b[first + offset : first + offset + len(part)].float(), coef[rows])
            da[rows] = product.mul_(scale)
        if db is not None:
            db.add_(matmul_fp32(part.T, a[rows]))
    of_positives = slice(offset, offset + num_rows)
    if db is not None:
        db.div_(unit)[of_positives].addcmul_(a.float(), coef)
        db.mul_(scale)
    if not needs_scale:
        return da, db, None
    of_tiles = torch.cat([*dscale, coef.new_zeros(1)]).sum() / unit
    return da, db, of_tiles + center * grad_total(grads)


def _grad_chunk(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    lses: tuple[Tensor, Tensor],
    coefs: tuple[Tensor, ...],
    offset: int,
    out: Tensor,
    needs_scale: bool,
) -> Tensor:
    """Write dL/dS of the rows `a`, zero at the positives, into `out`; returns partials of the scale's."""
    config = launch_config(TABLE, "bwd", a)
    grid = (triton.cdiv(a.shape[0], config.block_m), triton.cdiv(b.shape[0], config.block_n))
    a, b = operand(a, config.block_d), operand(b, config.block_d)
    dscale = a.new_empty(grid[1] * a.shape[0] if needs_scale else 0, dtype=torch.float32)
    _contrastive_bwd_kernel[grid](
        a,
        b,
        scale,
        *lses,
        *coefs,
        out,
        dscale,
        *a.stride(),
        *b.stride(),
        out.stride(0),
        a.shape[0],
        b.shape[0],
        a.shape[1],
        offset,
        HAS_GRAD=out.numel() > 0,
        HAS_DSCALE=needs_scale,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        INPUT_PRECISION=input_precision(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dscale
