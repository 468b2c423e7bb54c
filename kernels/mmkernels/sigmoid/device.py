"""The sigmoid loss's kernel: what runs on the GPU; kernel.py launches it."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mmkernels._tl import dot_tile


@triton.jit
def _log1p(t):
    """log(1 + t) of 0 <= t <= 1, within 1.5 ulp: t times a minimax polynomial of log1p(t) / t, 3e-8."""
    p = t * 0.005364822689443827 - 0.030065786093473434
    p = p * t + 0.07920452207326889
    p = p * t - 0.13753801584243774
    p = p * t + 0.191536545753479
    p = p * t - 0.24857163429260254
    p = p * t + 0.3332132399082184
    p = p * t - 0.49999648332595825
    return (p * t + 1.0) * t


@triton.jit
def _sigmoid_fwd_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    row_label_ptr,  # int32 [M]
    col_label_ptr,  # int32 [N]
    coef_ptr,  # [M]
    sums_ptr,  # [3, column tiles, M]: of the losses, of dL/dx, of dL/dx times the cosine
    grad_ptr,  # [M, N]
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_gm,
    M,
    N,
    D,
    offset,
    HAS_LABELS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = dot_tile(
        a_ptr, b_ptr, stride_am, stride_ad, stride_bn, stride_bd, offs_m, offs_n, M, N, D, BLOCK_D, INPUT_PRECISION
    )
    logits = acc * scale + bias
    # minus infinity has neither loss nor gradient
    if HAS_LABELS:
        row_label = tl.load(row_label_ptr + offs_m, mask=mask_m, other=0)
        col_label = tl.load(col_label_ptr + offs_n, mask=mask_n, other=0)
        is_positive = row_label[:, None] == col_label[None, :]
        against = tl.where(mask_n[None, :], tl.where(is_positive, -logits, logits), float("-inf"))
    else:
        is_positive = offs_m[:, None] + offset == offs_n[None, :]  # the caller adds these, in float32
        against = tl.where(is_positive | (offs_n >= N)[None, :], float("-inf"), logits)
    tail = tl.exp(-tl.abs(against))  # at most 1: nothing overflows
    # not tl.maximum, which would lose a NaN
    losses = tl.where(against < 0, 0.0, against) + _log1p(tail)
    sums_ptrs = sums_ptr + pid_n.to(tl.int64) * M + offs_m
    plane = tl.num_programs(1).to(tl.int64) * M
    tl.store(sums_ptrs, tl.sum(losses, 1), mask=mask_m)
    if HAS_GRAD or HAS_SUMS:
        grad = tl.where(against < 0, tail, 1.0) / (1.0 + tail)
        if HAS_LABELS:
            grad = tl.where(is_positive, -grad, grad)
        if HAS_SUMS:
            tl.store(sums_ptrs + plane, tl.sum(grad, 1), mask=mask_m)
            tl.store(sums_ptrs + 2 * plane, tl.sum(grad * acc, 1), mask=mask_m)
        if HAS_GRAD:
            coef = tl.load(coef_ptr + offs_m, mask=mask_m, other=0.0)
            stored = (grad * coef[:, None]).to(grad_ptr.dtype.element_ty)
            grad_ptrs = grad_ptr + offs_m.to(tl.int64)[:, None] * stride_gm + offs_n[None, :]
            # up to the pitch, not N: whole vectors; what lies between is never read
            tl.store(grad_ptrs, stored, mask=mask_m[:, None] & (offs_n < stride_gm)[None, :])
