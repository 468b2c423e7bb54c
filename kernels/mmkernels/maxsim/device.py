"""The MaxSim kernels: what runs on the GPU; kernel.py launches them."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mmkernels._tl import dot_tile


@triton.jit
def _fold_tile(
    products, row_max, row_best, mask_ptr, first_t, offs_t, T, HAS_MASK: tl.constexpr, HAS_BEST: tl.constexpr
):
    """The maxima of rows with a tile's products in them, and the first places where those are."""
    is_seen = offs_t < T
    if HAS_MASK:
        is_seen &= tl.load(mask_ptr + first_t + offs_t, mask=is_seen, other=0) != 0
    products = tl.where(is_seen[None, :], products, float("-inf"))
    tile_max = tl.max(products, 1)
    if HAS_BEST:
        tile_best = tl.min(tl.where(products == tile_max[:, None], offs_t[None, :], T), 1)
        row_best = tl.where(tile_max > row_max, tile_best, row_best)
    return tl.maximum(row_max, tile_max), row_best


# queries and documents come in any number and length: nothing is compiled anew for them
@triton.jit(do_not_specialize=["M", "T"])
def _maxsim_fwd_kernel(
    q_ptr,  # [M, D], the tokens of all queries
    d_ptr,  # [N * T, D]
    mask_ptr,  # [N * T]
    max_ptr,  # [N, M]
    best_ptr,  # [N, M]
    stride_qm,
    stride_dt,
    M,
    T,
    D,
    HAS_MASK: tl.constexpr,
    HAS_BEST: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    # neighbours share a document
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    first_t = pid_n.to(tl.int64) * T
    document_ptr = d_ptr + first_t * stride_dt
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_best = tl.full([BLOCK_M], -1, dtype=tl.int32)
    if IS_WHOLE:
        offs_d = tl.arange(0, BLOCK_D)
        rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
        q = tl.load(q_ptr + rows_m[:, None] * stride_qm + offs_d[None, :])
        for start_t in range(0, T, BLOCK_N):
            offs_t = start_t + tl.arange(0, BLOCK_N)
            rows_t = tl.minimum(offs_t, T - 1).to(tl.int64)
            d = tl.load(document_ptr + rows_t[None, :] * stride_dt + offs_d[:, None])
            products = tl.dot(q, d, input_precision=INPUT_PRECISION)
            row_max, row_best = _fold_tile(
                products, row_max, row_best, mask_ptr, first_t, offs_t, T, HAS_MASK, HAS_BEST
            )
    else:
        for start_t in range(0, T, BLOCK_N):
            offs_t = start_t + tl.arange(0, BLOCK_N)
            products = dot_tile(
                q_ptr, document_ptr, stride_qm, 1, stride_dt, 1, offs_m, offs_t, M, T, D, BLOCK_D, INPUT_PRECISION
            )
            row_max, row_best = _fold_tile(
                products, row_max, row_best, mask_ptr, first_t, offs_t, T, HAS_MASK, HAS_BEST
            )
    at = pid_n.to(tl.int64) * M + offs_m
    tl.store(max_ptr + at, row_max, mask=mask_m)
    if HAS_BEST:
        tl.store(best_ptr + at, row_best.to(best_ptr.dtype.element_ty), mask=mask_m)


@triton.jit(do_not_specialize=["M", "T", "N", "B", "Q", "docs_per_split"])
def _maxsim_bwd_q_kernel(
    d_ptr,  # [N * T, D]
    best_ptr,  # [N, M]
    grad_ptr,  # [N, B]
    dq_ptr,  # [splits, M, D]
    stride_dt,
    M,
    T,
    N,
    B,
    Q,
    D,
    docs_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < M, offs_d < D
    offs_b = offs_m // Q
    first_n = tl.program_id(2) * docs_per_split
    last_n = tl.minimum(first_n + docs_per_split, N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    place = first_n.to(tl.int64)
    for _ in range(first_n, last_n):
        best = tl.load(best_ptr + place * M + offs_m, mask=mask_m, other=-1).to(tl.int32)
        grad = tl.load(grad_ptr + place * B + offs_b, mask=mask_m, other=0.0)
        rows = place * T + best
        mask = (best >= 0)[:, None] & mask_d[None, :]
        winners = tl.load(d_ptr + rows[:, None] * stride_dt + offs_d[None, :], mask=mask, other=0.0)
        acc += grad[:, None] * winners.to(tl.float32)
        place += 1
    dq_ptrs = dq_ptr + (tl.program_id(2).to(tl.int64) * M + offs_m)[:, None] * D + offs_d[None, :]
    tl.store(dq_ptrs, acc.to(dq_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["M", "T", "B", "Q"])
def _maxsim_bwd_d_kernel(
    q_ptr,  # [M, D]
    best_ptr,  # [N, M]
    grad_ptr,  # [N, B]
    unit_ptr,  # []: what dL/dscores are divided by
    dd_ptr,  # [N * T, D]
    stride_qm,
    M,
    T,
    B,
    Q,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    blocks_t = tl.cdiv(T, BLOCK_N)
    pid_t, pid_n = tl.program_id(0) % blocks_t, tl.program_id(0) // blocks_t
    place = pid_n.to(tl.int64)
    offs_t = pid_t * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    unit = tl.load(unit_ptr)
    acc = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)
    for start_m in range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows_m = tl.minimum(offs_m, M - 1)
        best = tl.load(best_ptr + place * M + offs_m, mask=mask_m, other=-1).to(tl.int32)
        grad = tl.load(grad_ptr + place * B + rows_m // Q) / unit
        # a row of it is a sum over the tokens whose best it is, as a product with a matrix of few entries
        weights = tl.where(best[None, :] == offs_t[:, None], grad[None, :], 0.0)
        q = tl.load(q_ptr + rows_m.to(tl.int64)[None, :] * stride_qm + offs_d[:, None])
        # q first: of products on sm_90 the first operand is read where it was loaded to
        acc = tl.dot(q, tl.trans(weights.to(q.dtype)), acc, input_precision=INPUT_PRECISION)
    dd_ptrs = dd_ptr + (place * T + offs_t)[None, :] * D + offs_d[:, None]
    mask = (offs_t < T)[None, :] & (offs_d < D)[:, None]
    tl.store(dd_ptrs, (acc * unit).to(dd_ptr.dtype.element_ty), mask=mask)
