"""The token-contrastive kernels: what runs on the GPU; kernel.py launches them.

A tile is some columns of S against all tokens of some rows (or, of more tokens than a tile is wide, block after
block of one row's with a running maximum). Tokens lie along the tile's last axis, so that most of the maximum
is taken within a thread's own registers. Pass 1 leaves each tile's own maxima and sums, which a second kernel
combines. Pass 2 writes dL/d(products), zero but at the best tokens, for a chunk of rows and leaves the two products
to the GEMM library.
"""

# triton types a jitted function as one that does not return, and neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mmkernels._device import INTERPRETED
from mmkernels._tl import Constant, dot_tile, tile_place
from mmkernels.token_contrastive.device_vectors import LOG2_E, NOWHERE

# The interpreter reduces by a function of ours one element after the other.
IS_INTERPRETED = Constant(INTERPRETED)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(products):
    """Along the last axis; of what is not a number, that."""
    if IS_INTERPRETED:
        largest = tl.max(tl.where(products == products, products, float("inf")), 2)
        return tl.where(largest == float("inf"), float("nan"), largest)
    else:
        return tl.reduce(products, 2, _larger)


@triton.jit
def _products(
    tokens,
    b,
    stride_tm,
    stride_bn,
    first_m,
    first_q,
    first_n,
    M,
    N,
    Q,
    D,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Of BLOCK_N columns with BLOCK_Q tokens of each row, [BLOCK_N, BLOCK_M]: by descriptors zero beyond the last
    column, row or token; by pointers those of the last one again."""
    ROWS: tl.constexpr = BLOCK_M // BLOCK_Q
    if DESCRIBED:
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for first in range(0, D, BLOCK_D):
            x, y = b.load([first_n, first]), tokens.load([first_m, first_q, first])
            acc = tl.dot(x, tl.reshape(y, [BLOCK_M, BLOCK_D]).T, acc, input_precision=INPUT_PRECISION)
        return acc
    else:
        offs_m, offs_q = first_m + tl.arange(0, ROWS), first_q + tl.arange(0, BLOCK_Q)
        places = tl.minimum(offs_m, M - 1)[:, None] * Q + tl.minimum(offs_q, Q - 1)[None, :]
        return dot_tile(
            b, tokens, stride_bn, 1, stride_tm, 1, first_n + tl.arange(0, BLOCK_N), tl.reshape(places, [BLOCK_M]),
            N, M * Q, D, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip


@triton.jit
def _best_tokens(
    tokens,
    b,
    mask_ptr,
    stride_tm,
    stride_bn,
    first_m,
    first_n,
    M,
    N,
    Q,
    D,
    HAS_MASK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Of columns from `first_n` on with rows from `first_m` on, the largest product over Q tokens and the first token
    that has it, [BLOCK_N, ROWS] each; -inf where all are masked."""
    ROWS: tl.constexpr = BLOCK_M // BLOCK_Q
    best = tl.full([BLOCK_N, ROWS], float("-inf"), dtype=tl.float32)
    winner = tl.zeros([BLOCK_N, ROWS], dtype=tl.int32)
    for first_q in range(0, BLOCK_Q if IS_SINGLE else Q, BLOCK_Q):
        acc = _products(
            tokens, b, stride_tm, stride_bn, first_m, first_q, first_n, M, N, Q, D,
            DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_Q, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
        products = tl.reshape(acc, [BLOCK_N, ROWS, BLOCK_Q])
        offs_q = first_q + tl.arange(0, BLOCK_Q)
        if HAS_MASK:
            offs_m = first_m + tl.arange(0, ROWS)
            is_there = (offs_m < M)[:, None] & (offs_q < Q)[None, :]
            counts = tl.load(mask_ptr + offs_m[:, None] * Q + offs_q[None, :], mask=is_there, other=0)
            products = tl.where((counts != 0)[None, :, :], products, float("-inf"))
        elif DESCRIBED and not IS_WHOLE:
            # zero there: by pointers the last token again, which changes no maximum
            products = tl.where((offs_q < Q)[None, None, :], products, float("-inf"))
        largest = _largest(products)
        first = tl.min(tl.where(products == largest[:, :, None], offs_q[None, None, :], Q - 1), 2)
        winner = tl.where(largest > best, first, winner)
        best = _larger(best, largest)
    return best, winner


@triton.jit
def _positive_place(positives_ptr, offs_m, M, N):
    """The columns of the rows' positives, -1 for none."""
    # int64 in what is given: beyond 32 bits there is no column
    place = tl.load(positives_ptr + offs_m, mask=offs_m < M, other=-1)
    return tl.where((place >= 0) & (place < N), place, -1).to(tl.int32)


@triton.jit
def _store_softmax(ptr, plane, logits, axis: tl.constexpr):
    """The maximum of each row or column of a tile and its sum of exponentials."""
    largest = tl.max(logits, axis)
    by = tl.maximum(largest, NOWHERE)
    tl.store(ptr, largest)
    tl.store(ptr + plane, tl.sum(tl.exp2((logits - tl.expand_dims(by, axis)) * LOG2_E), axis))


@triton.jit
def _store_sums(row_ptr, col_ptr, values):
    tl.store(row_ptr, tl.sum(values, 0))
    tl.store(col_ptr, tl.sum(values, 1))


@triton.jit(do_not_specialize=["M", "N"])
def _token_contrastive_fwd_kernel(
    scale_ptr,
    tokens,  # pointers, or descriptors of tiles
    b,
    mask_ptr,
    positives_ptr,
    row_labels_ptr,
    col_labels_ptr,
    row_ptr,  # [max sum total matched, column tiles, row tiles * ROWS]
    col_ptr,  # [max sum total matched, row tiles, column tiles * BLOCK_N]
    positive_ptr,
    stride_tm,
    stride_bn,
    M,
    N,
    Q,
    D,
    HAS_MASK: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_M // BLOCK_Q  # of a tile of BLOCK_M tokens
    tiles_m, tiles_n = tl.cdiv(M, ROWS), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    row_plane, col_plane = tiles.to(tl.int64) * ROWS, tiles.to(tl.int64) * BLOCK_N
    scale = tl.load(scale_ptr).to(tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = tile_place(tile, tiles_m, tiles_n)
        first_m, first_n = pid_m * ROWS, pid_n * BLOCK_N
        best, _ = _best_tokens(
            tokens, b, mask_ptr, stride_tm, stride_bn, first_m, first_n, M, N, Q, D,
            HAS_MASK, IS_WHOLE, IS_SINGLE, DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_Q, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
        if HAS_MASK:
            best = tl.where(best == float("-inf"), 0.0, best)
        offs_m, offs_n = first_m + tl.arange(0, ROWS), first_n + tl.arange(0, BLOCK_N)
        inside = (offs_n < N)[:, None] & (offs_m < M)[None, :]
        logits = tl.where(inside, best * scale, float("-inf"))
        row_ptrs = row_ptr + (pid_n.to(tl.int64) * tiles_m + pid_m) * ROWS + tl.arange(0, ROWS)
        col_ptrs = col_ptr + (pid_m.to(tl.int64) * tiles_n + pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        _store_softmax(row_ptrs, row_plane, logits, 0)
        _store_softmax(col_ptrs, col_plane, logits, 1)
        if HAS_POSITIVES:
            place = _positive_place(positives_ptr, offs_m, M, N)
            is_there = (place >= first_n) & (place < first_n + BLOCK_N)
            if tl.max(is_there.to(tl.int32), 0) > 0:
                hit = tl.where(offs_n[:, None] == place[None, :], logits, 0.0)
                tl.store(positive_ptr + offs_m, tl.sum(hit, 0), mask=is_there)
        if HAS_TOTALS:
            _store_sums(row_ptrs + 2 * row_plane, col_ptrs + 2 * col_plane, tl.where(inside, logits, 0.0))
        if HAS_LABELS:
            row_labels = tl.load(row_labels_ptr + offs_m, mask=offs_m < M, other=0)
            col_labels = tl.load(col_labels_ptr + offs_n, mask=offs_n < N, other=0)
            equal = (row_labels[None, :] == col_labels[:, None]) & inside
            _store_sums(row_ptrs + 3 * row_plane, col_ptrs + 3 * col_plane, tl.where(equal, logits, 0.0))


@triton.jit
def _grad_tile(
    logits,
    positives_ptr,
    row_labels_ptr,
    col_labels_ptr,
    row_lse_ptr,
    col_lse_ptr,
    row_ptr,
    col_ptr,
    positive_ptr,
    row_total_ptr,
    col_total_ptr,
    row_matched_ptr,
    col_matched_ptr,
    offs_m,
    offs_n,
    M,
    N,
    HAS_POSITIVES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
):
    """dL/dS of a tile [BLOCK_N, ROWS]."""
    mask_m, mask_n = offs_m < M, offs_n < N
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=0.0)
    row = tl.load(row_ptr + offs_m, mask=mask_m, other=0.0)
    grad = tl.exp2((logits - row_lse[None, :]) * LOG2_E) * row[None, :]
    col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=0.0)
    col = tl.load(col_ptr + offs_n, mask=mask_n, other=0.0)
    grad += tl.exp2((logits - col_lse[:, None]) * LOG2_E) * col[:, None]
    if HAS_POSITIVES:
        place = _positive_place(positives_ptr, offs_m, M, N)
        positive = tl.load(positive_ptr + offs_m, mask=mask_m, other=0.0)
        grad += tl.where(offs_n[:, None] == place[None, :], positive[None, :], 0.0)
    if HAS_LABELS:
        row_labels = tl.load(row_labels_ptr + offs_m, mask=mask_m, other=0)
        col_labels = tl.load(col_labels_ptr + offs_n, mask=mask_n, other=0)
        row_matched = tl.load(row_matched_ptr + offs_m, mask=mask_m, other=0.0)
        col_matched = tl.load(col_matched_ptr + offs_n, mask=mask_n, other=0.0)
        equal = row_labels[None, :] == col_labels[:, None]
        grad += tl.where(equal, row_matched[None, :] + col_matched[:, None], 0.0)
    if HAS_TOTALS:
        grad += tl.load(row_total_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
        grad += tl.load(col_total_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    return grad


@triton.jit(do_not_specialize=["M", "N"])
def _token_contrastive_bwd_kernel(
    scale_ptr,
    tokens,  # pointers, or descriptors of tiles
    b,
    grad,  # [N, M * Q], or [N, M, Q] a descriptor
    mask_ptr,
    positives_ptr,
    row_labels_ptr,
    col_labels_ptr,
    row_lse_ptr,
    col_lse_ptr,
    row_ptr,  # the weights of dL/dS
    col_ptr,
    positive_ptr,
    row_total_ptr,
    col_total_ptr,
    row_matched_ptr,
    col_matched_ptr,
    center_ptr,
    dscale_ptr,  # [programs]
    stride_tm,
    stride_bn,
    stride_gn,
    M,
    N,
    Q,
    D,
    HAS_MASK: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    IN_VECTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dL/d(products), in units, and the sum of dL/dS times the products less their center."""
    ROWS: tl.constexpr = BLOCK_M // BLOCK_Q  # of a tile of BLOCK_M tokens
    tiles_m, tiles_n = tl.cdiv(M, ROWS), tl.cdiv(N, BLOCK_N)
    scale, center = tl.load(scale_ptr).to(tl.float32), tl.load(center_ptr).to(tl.float32)
    total = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_place(tile, tiles_m, tiles_n)
        first_m, first_n = pid_m * ROWS, pid_n * BLOCK_N
        best, winner = _best_tokens(
            tokens, b, mask_ptr, stride_tm, stride_bn, first_m, first_n, M, N, Q, D,
            HAS_MASK, IS_WHOLE, IS_SINGLE, DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_Q, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
        cosines = best
        if HAS_MASK:
            cosines = tl.where(best == float("-inf"), 0.0, best)
        offs_m, offs_n = first_m + tl.arange(0, ROWS), first_n + tl.arange(0, BLOCK_N)
        values = _grad_tile(
            cosines * scale, positives_ptr, row_labels_ptr, col_labels_ptr, row_lse_ptr, col_lse_ptr, row_ptr, col_ptr,
            positive_ptr, row_total_ptr, col_total_ptr, row_matched_ptr, col_matched_ptr, offs_m, offs_n, M, N,
            HAS_POSITIVES, HAS_LABELS, HAS_TOTALS,
        )  # fmt: skip
        inside = (offs_n < N)[:, None] & (offs_m < M)[None, :]
        total += tl.where(inside, values * (cosines - center), 0.0)
        if HAS_GRAD:
            if HAS_MASK:
                values = tl.where(best == float("-inf"), 0.0, values)
            for first_q in range(0, BLOCK_Q if IS_SINGLE else Q, BLOCK_Q):
                offs_q = first_q + tl.arange(0, BLOCK_Q)
                routed = tl.where(offs_q[None, None, :] == winner[:, :, None], values[:, :, None], 0.0)
                if DESCRIBED and IN_VECTORS:
                    grad.store([first_n, first_m, first_q], routed.to(grad.dtype))
                else:
                    ptrs = grad + offs_n.to(tl.int64)[:, None] * stride_gn + (offs_m * Q)[None, :]
                    is_there = inside[:, :, None] & (offs_q < Q)[None, None, :]
                    tl.store(ptrs[:, :, None] + offs_q, routed.to(grad.dtype.element_ty), mask=is_there)
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))
