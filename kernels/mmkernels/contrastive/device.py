"""The contrastive kernels: what runs on the GPU; kernel.py launches them.

Pass 1 reads each tile once for both directions: row sums stay in registers, column sums go to a row of
partials that the program owns. Pass 2 writes dL/dS for a chunk of rows and leaves the two products to the
GEMM library.
"""

import triton
import triton.language as tl

from mmkernels._tl import dot_tile


@triton.jit
def _fold_rows(logits, weights, old_max, old_sum, old_cross, HAS_CROSS: tl.constexpr):
    """Online `sum exp(x - max)` along the rows of a tile, and of it times the weights."""
    new_max = tl.maximum(old_max, tl.max(logits, 1))
    exponentials = tl.exp(logits - new_max[:, None])
    shrink = tl.exp(old_max - new_max)
    new_sum = old_sum * shrink + tl.sum(exponentials, 1)
    new_cross = old_cross
    if HAS_CROSS:
        new_cross = old_cross * shrink + tl.sum(exponentials * weights, 1)
    return new_max, new_sum, new_cross


@triton.jit
def _fold_columns(col_ptrs, stride_plane, logits, weights, mask_n, seen, HAS_CROSS: tl.constexpr):
    """Fold a tile into the program's own column sums: what it stored one row tile ago, nothing before that."""
    # the tile's own sums first: what is loaded before them would have to wait in registers
    tile_max = tl.max(logits, 0)
    exponentials = tl.exp(logits - tile_max[None, :])
    tile_sum = tl.sum(exponentials, 0)
    old_max = tl.load(col_ptrs, mask=seen, other=float("-inf"))
    new_max = tl.maximum(old_max, tile_max)
    shrink, tile_shrink = tl.exp(old_max - new_max), tl.exp(tile_max - new_max)
    col_sum = tl.load(col_ptrs + stride_plane, mask=seen, other=0.0) * shrink + tile_sum * tile_shrink
    if HAS_CROSS:
        cross_ptrs = col_ptrs + 2 * stride_plane
        tile_cross = tl.sum(exponentials * weights, 0)
        col_cross = tl.load(cross_ptrs, mask=seen, other=0.0) * shrink + tile_cross * tile_shrink
    # no thread may overwrite a sum that another has still to read, nor read one not yet written
    tl.debug_barrier()
    tl.store(col_ptrs, new_max, mask=mask_n)
    tl.store(col_ptrs + stride_plane, col_sum, mask=mask_n)
    if HAS_CROSS:
        tl.store(cross_ptrs, col_cross, mask=mask_n)
    tl.debug_barrier()


@triton.jit
def _contrastive_fwd_kernel(
    a_ptr,
    b_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    scale_ptr,
    shift_ptr,
    positives_ptr,  # int64 [M]
    row_ptr,  # [planes, splits, M]
    col_ptr,  # [planes, programs, N]
    positive_ptr,  # [M]
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_tm,
    stride_tn,
    stride_cp,
    M,
    N,
    D,
    cols_per_split,
    SYMMETRIC: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr).to(tl.float32)
    first_n = pid_n * cols_per_split
    last_n = tl.minimum(first_n + cols_per_split, N)
    row_plane = tl.num_programs(1).to(tl.int64) * M
    col_plane = tl.num_programs(0).to(tl.int64) * stride_cp
    for start_m in range(pid_m * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        teacher_max, teacher_sum, teacher_cross = row_max, row_sum, row_sum
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
            inside = mask_m[:, None] & mask_n[None, :]
            seen = mask_n & (start_m >= tl.num_programs(0) * BLOCK_M)
            col_ptrs = col_ptr + pid_m.to(tl.int64) * stride_cp + offs_n

            if HAS_TEACHER:
                teacher_acc = dot_tile(
                    teacher_a_ptr,
                    teacher_b_ptr,
                    stride_tm,
                    stride_ad,
                    stride_tn,
                    stride_bd,
                    offs_m,
                    offs_n,
                    M,
                    N,
                    D,
                    BLOCK_D,
                    INPUT_PRECISION,
                )
                of_teacher = tl.where(inside, teacher_acc * scale, float("-inf"))
                if SYMMETRIC:
                    teacher_ptrs = col_ptrs + 2 * col_plane
                    _fold_columns(teacher_ptrs, col_plane, of_teacher, logits, mask_n, seen, True)
                teacher_max, teacher_sum, teacher_cross = _fold_rows(
                    of_teacher, logits, teacher_max, teacher_sum, teacher_cross, True
                )

            # -inf outside for rows and columns at once: what lies there is not a number, and not stored
            logits = tl.where(inside, logits, float("-inf"))
            if HAS_POSITIVES:
                # again for every tile: kept, they would cost registers through the product
                place = tl.load(positives_ptr + offs_m, mask=mask_m, other=-1)
                place = tl.where(place.to(tl.uint64) < N.to(tl.uint64), place, -1).to(tl.int32)
                found = (place >= start_n) & (place < tl.minimum(start_n + BLOCK_N, N))
                if tl.max(found.to(tl.int32), 0) > 0:
                    is_positive = offs_n[None, :] == place[:, None]
                    of_row = tl.sum(tl.where(is_positive, logits, 0.0), 1)
                    tl.store(positive_ptr + offs_m, of_row, mask=found)

            if SHIFTED:
                exponentials = tl.exp(logits - tl.load(shift_ptr))
                row_sum += tl.sum(exponentials, 1)
                if SYMMETRIC:
                    old_sum = tl.load(col_ptrs + col_plane, mask=seen, other=0.0)
                    col_sum = old_sum + tl.sum(exponentials, 0)
                    tl.debug_barrier()
                    tl.store(col_ptrs + col_plane, col_sum, mask=mask_n)
                    tl.debug_barrier()
            else:
                if SYMMETRIC:
                    _fold_columns(col_ptrs, col_plane, logits, logits, mask_n, seen, False)
                row_max, row_sum, _ = _fold_rows(logits, logits, row_max, row_sum, row_sum, False)
        row_ptrs = row_ptr + pid_n.to(tl.int64) * M + offs_m
        tl.store(row_ptrs, row_max, mask=mask_m)
        tl.store(row_ptrs + row_plane, row_sum, mask=mask_m)
        if HAS_TEACHER:
            tl.store(row_ptrs + 2 * row_plane, teacher_max, mask=mask_m)
            tl.store(row_ptrs + 3 * row_plane, teacher_sum, mask=mask_m)
            tl.store(row_ptrs + 4 * row_plane, teacher_cross, mask=mask_m)


@triton.jit
def _softmaxes(
    logits,
    row_lse_ptr,
    col_lse_ptr,
    row_coef_ptr,
    col_coef_ptr,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    SYMMETRIC: tl.constexpr,
):
    """`row_coef exp(x - row_lse) + col_coef exp(x - col_lse)` of a tile."""
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=0.0)
    row_coef = tl.load(row_coef_ptr + offs_m, mask=mask_m, other=0.0)
    grad = tl.exp(logits - row_lse[:, None]) * row_coef[:, None]
    if SYMMETRIC:
        col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=0.0)
        col_coef = tl.load(col_coef_ptr + offs_n, mask=mask_n, other=0.0)
        grad += tl.exp(logits - col_lse[None, :]) * col_coef[None, :]
    return grad


@triton.jit
def _contrastive_bwd_kernel(
    a_ptr,
    b_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    scale_ptr,
    positives_ptr,
    row_lse_ptr,
    col_lse_ptr,
    row_coef_ptr,
    col_coef_ptr,
    teacher_row_lse_ptr,
    teacher_col_lse_ptr,
    teacher_row_coef_ptr,
    teacher_col_coef_ptr,
    center_ptr,
    grad_ptr,  # [chunk, N]
    dscale_ptr,  # [column tiles, M]
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_tm,
    stride_tn,
    stride_gm,
    M,
    N,
    D,
    SYMMETRIC: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
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
        a_ptr, b_ptr, stride_am, stride_ad, stride_bn, stride_bd, offs_m, offs_n, M, N, D, BLOCK_D, INPUT_PRECISION
    )
    grad = _softmaxes(
        acc * scale, row_lse_ptr, col_lse_ptr, row_coef_ptr, col_coef_ptr, offs_m, offs_n, mask_m, mask_n, SYMMETRIC
    )
    if HAS_POSITIVES:
        # the positive's share is added in float32 by the caller
        place = tl.load(positives_ptr + offs_m, mask=mask_m, other=-1)
        grad = tl.where(offs_n[None, :] == place[:, None], 0.0, grad)
    if HAS_TEACHER:
        teacher_acc = dot_tile(
            teacher_a_ptr,
            teacher_b_ptr,
            stride_tm,
            stride_ad,
            stride_tn,
            stride_bd,
            offs_m,
            offs_n,
            M,
            N,
            D,
            BLOCK_D,
            INPUT_PRECISION,
        )
        grad += _softmaxes(
            teacher_acc * scale,
            teacher_row_lse_ptr,
            teacher_col_lse_ptr,
            teacher_row_coef_ptr,
            teacher_col_coef_ptr,
            offs_m,
            offs_n,
            mask_m,
            mask_n,
            SYMMETRIC,
        )
    if HAS_GRAD:
        grad_ptrs = grad_ptr + offs_m.to(tl.int64)[:, None] * stride_gm + offs_n[None, :]
        # up to the pitch, not N: whole vectors; what lies between is never read
        stored = mask_m[:, None] & (offs_n < stride_gm)[None, :]
        tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=stored)
    if HAS_DSCALE:
        inside = mask_m[:, None] & mask_n[None, :]
        partial = tl.sum(tl.where(inside, grad * (acc - tl.load(center_ptr)), 0.0), 1)
        tl.store(dscale_ptr + pid_n.to(tl.int64) * M + offs_m, partial, mask=mask_m)
