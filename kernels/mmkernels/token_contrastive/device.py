"""The token-contrastive kernels: what runs on the GPU; kernel.py launches them.

A tile is some columns of S against all tokens of some rows (or, of more tokens than a tile is wide, block after
block of one row's with a running maximum). Tokens lie along the tile's last axis, so that most of the maximum
is taken within a thread's own registers. Pass 2 writes dL/d(products), zero but at the best tokens, for a chunk
of rows and leaves the two products to the GEMM library.
"""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mmkernels._tl import dot_tile


@triton.jit
def _best_tokens(
    tokens_ptr,
    b_ptr,
    mask_ptr,
    stride_tm,
    stride_td,
    stride_bn,
    stride_bd,
    offs_m,
    offs_n,
    M,
    N,
    Q,
    D,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Of columns `offs_n` with rows `offs_m`, the largest product over Q tokens and the first token that has
    it, [BLOCK_N, ROWS] each; -inf where all are masked."""
    ROWS: tl.constexpr = BLOCK_M // BLOCK_Q  # of a tile of BLOCK_M tokens
    best = tl.full([BLOCK_N, ROWS], float("-inf"), dtype=tl.float32)
    winner = tl.zeros([BLOCK_N, ROWS], dtype=tl.int32)
    for first_q in range(0, Q, BLOCK_Q):
        offs_q = first_q + tl.arange(0, BLOCK_Q)
        # beyond the last token, that token again: it changes no maximum
        places = tl.minimum(offs_m, M - 1)[:, None] * Q + tl.minimum(offs_q, Q - 1)[None, :]
        places = tl.reshape(places, [BLOCK_M])
        acc = dot_tile(
            b_ptr,
            tokens_ptr,
            stride_bn,
            stride_bd,
            stride_tm,
            stride_td,
            offs_n,
            places,
            N,
            M * Q,
            D,
            BLOCK_D,
            INPUT_PRECISION,
        )
        if HAS_MASK:
            counts = tl.load(mask_ptr + places)
            acc = tl.where((counts != 0)[None, :], acc, float("-inf"))
        # a maximum drops NaN, but not infinity
        acc = tl.where(acc == acc, acc, float("inf"))
        products = tl.reshape(acc, [BLOCK_N, ROWS, BLOCK_Q])
        largest = tl.max(products, 2)
        first = tl.min(tl.where(products == largest[:, :, None], offs_q[None, None, :], Q - 1), 2)
        winner = tl.where(largest > best, first, winner)
        best = tl.maximum(best, largest)
    best = tl.where(best == float("inf"), float("nan"), best)
    return best, winner


@triton.jit
def _token_contrastive_fwd_kernel(
    tokens_ptr,
    b_ptr,
    scale_ptr,
    mask_ptr,
    positives_ptr,
    row_labels_ptr,
    col_labels_ptr,
    of_rows_ptr,  # [max sum total matched, splits, M]
    of_cols_ptr,  # [max sum total matched, programs, N]
    positive_ptr,
    stride_tm,
    stride_td,
    stride_bn,
    stride_bd,
    stride_rk,
    stride_ck,
    stride_cp,
    M,
    N,
    Q,
    D,
    cols_per_split,
    HAS_MASK: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_M // BLOCK_Q  # of a tile of BLOCK_M tokens
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr).to(tl.float32)
    first_n = pid_n * cols_per_split
    last_n = tl.minimum(first_n + cols_per_split, N)
    rows_ptr = of_rows_ptr + pid_n.to(tl.int64) * M
    cols_ptr = of_cols_ptr + pid_m.to(tl.int64) * stride_cp
    stride_rk, stride_ck = stride_rk.to(tl.int64), stride_ck.to(tl.int64)
    for start_m in range(pid_m * ROWS, M, tl.num_programs(0) * ROWS):
        offs_m = start_m + tl.arange(0, ROWS)
        mask_m = offs_m < M
        row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([ROWS], dtype=tl.float32)
        row_total = tl.zeros([ROWS], dtype=tl.float32)
        row_matched = tl.zeros([ROWS], dtype=tl.float32)
        for start_n in range(first_n, last_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < last_n
            best, _ = _best_tokens(
                tokens_ptr,
                b_ptr,
                mask_ptr,
                stride_tm,
                stride_td,
                stride_bn,
                stride_bd,
                offs_m,
                offs_n,
                M,
                N,
                Q,
                D,
                HAS_MASK,
                BLOCK_N,
                BLOCK_M,
                BLOCK_Q,
                BLOCK_D,
                INPUT_PRECISION,
            )
            if HAS_MASK:
                best = tl.where(best == float("-inf"), 0.0, best)
            logits = best * scale  # [BLOCK_N, ROWS]
            # the program's own column sums: what it stored one row tile ago, nothing before its first
            seen = mask_n & (start_m >= tl.num_programs(0) * ROWS)
            col_ptrs = cols_ptr + offs_n

            if HAS_POSITIVES:
                place = tl.load(positives_ptr + offs_m, mask=mask_m, other=-1)
                found = (place >= start_n) & (place < tl.minimum(start_n + BLOCK_N, last_n))
                hit = tl.where(offs_n[:, None] == place[None, :], logits, 0.0)
                tl.store(positive_ptr + offs_m, tl.sum(hit, 0), mask=found)
            if HAS_LABELS:
                row_labels = tl.load(row_labels_ptr + offs_m, mask=mask_m, other=0)
                col_labels = tl.load(col_labels_ptr + offs_n, mask=mask_n, other=0)
                equal = (row_labels[None, :] == col_labels[:, None]) & mask_m[None, :] & mask_n[:, None]
                matched = tl.where(equal, logits, 0.0)
                row_matched += tl.sum(matched, 0)
                col_matched = tl.load(col_ptrs + 3 * stride_ck, mask=seen, other=0.0) + tl.sum(matched, 1)
            if HAS_TOTALS:
                inside = tl.where(mask_m[None, :] & mask_n[:, None], logits, 0.0)
                row_total += tl.sum(inside, 0)
                col_total = tl.load(col_ptrs + 2 * stride_ck, mask=seen, other=0.0) + tl.sum(inside, 1)

            of_col = tl.where(mask_m[None, :], logits, float("-inf"))
            tile_max = tl.max(of_col, 1)
            tile_sum = tl.sum(tl.exp(of_col - tile_max[:, None]), 1)
            old_max = tl.load(col_ptrs, mask=seen, other=float("-inf"))
            old_sum = tl.load(col_ptrs + stride_ck, mask=seen, other=0.0)
            new_max = tl.maximum(old_max, tile_max)
            col_sum = old_sum * tl.exp(old_max - new_max) + tile_sum * tl.exp(tile_max - new_max)
            # no thread may overwrite a sum that another has still to read, nor read one not yet written
            tl.debug_barrier()
            tl.store(col_ptrs, new_max, mask=mask_n)
            tl.store(col_ptrs + stride_ck, col_sum, mask=mask_n)
            if HAS_TOTALS:
                tl.store(col_ptrs + 2 * stride_ck, col_total, mask=mask_n)
            if HAS_LABELS:
                tl.store(col_ptrs + 3 * stride_ck, col_matched, mask=mask_n)
            tl.debug_barrier()

            of_row = tl.where(mask_n[:, None], logits, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(of_row, 0))
            row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(of_row - new_max[None, :]), 0)
            row_max = new_max
        tl.store(rows_ptr + offs_m, row_max, mask=mask_m)
        tl.store(rows_ptr + stride_rk + offs_m, row_sum, mask=mask_m)
        if HAS_TOTALS:
            tl.store(rows_ptr + 2 * stride_rk + offs_m, row_total, mask=mask_m)
        if HAS_LABELS:
            tl.store(rows_ptr + 3 * stride_rk + offs_m, row_matched, mask=mask_m)


@triton.jit
def _token_contrastive_bwd_kernel(
    tokens_ptr,
    b_ptr,
    scale_ptr,
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
    grad_ptr,  # [N, M * Q]
    dscale_ptr,  # [column tiles, M]
    stride_tm,
    stride_td,
    stride_bn,
    stride_bd,
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
    HAS_DSCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_M // BLOCK_Q  # of a tile of BLOCK_M tokens
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr).to(tl.float32)
    offs_m = pid_m * ROWS + tl.arange(0, ROWS)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    best, winner = _best_tokens(
        tokens_ptr,
        b_ptr,
        mask_ptr,
        stride_tm,
        stride_td,
        stride_bn,
        stride_bd,
        offs_m,
        offs_n,
        M,
        N,
        Q,
        D,
        HAS_MASK,
        BLOCK_N,
        BLOCK_M,
        BLOCK_Q,
        BLOCK_D,
        INPUT_PRECISION,
    )
    cosines = best
    if HAS_MASK:
        cosines = tl.where(best == float("-inf"), 0.0, best)
    logits = cosines * scale  # [BLOCK_N, ROWS]
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=0.0)
    row = tl.load(row_ptr + offs_m, mask=mask_m, other=0.0)
    grad = tl.exp(logits - row_lse[None, :]) * row[None, :]
    col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=0.0)
    col = tl.load(col_ptr + offs_n, mask=mask_n, other=0.0)
    grad += tl.exp(logits - col_lse[:, None]) * col[:, None]
    if HAS_POSITIVES:
        place = tl.load(positives_ptr + offs_m, mask=mask_m, other=-1)
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
    if HAS_DSCALE:
        inside = mask_m[None, :] & mask_n[:, None]
        partial = tl.sum(tl.where(inside, grad * (cosines - tl.load(center_ptr)), 0.0), 0)
        tl.store(dscale_ptr + pid_n.to(tl.int64) * M + offs_m, partial, mask=mask_m)
    if HAS_GRAD:
        if HAS_MASK:
            grad = tl.where(best == float("-inf"), 0.0, grad)
        grad_ptrs = grad_ptr + offs_n.to(tl.int64)[:, None] * stride_gn + (offs_m * Q)[None, :]
        for first_q in range(0, Q, BLOCK_Q):
            offs_q = first_q + tl.arange(0, BLOCK_Q)
            routed = tl.where(offs_q[None, None, :] == winner[:, :, None], grad[:, :, None], 0.0)
            mask = mask_n[:, None, None] & mask_m[None, :, None] & (offs_q < Q)[None, None, :]
            tl.store(grad_ptrs[:, :, None] + offs_q[None, None, :], routed.to(grad_ptr.dtype.element_ty), mask=mask)
