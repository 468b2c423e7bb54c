"""The linear cross-entropy's kernel: what runs on the GPU; kernel.py launches it."""

import triton
import triton.language as tl


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    logits_ptr,  # [M, V]
    grad_ptr,  # [M, V], in the memory of the logits
    bias_ptr,  # [V]
    targets_ptr,  # [M]
    coef_ptr,
    row_max_ptr,
    row_sum_ptr,
    target_logit_ptr,
    stride_lm,
    stride_gm,
    M,
    V,
    z_loss,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)  # beyond the last row, that row again
    target = tl.load(targets_ptr + rows)
    target_logit = tl.load(logits_ptr + rows * stride_lm + target)
    if HAS_BIAS:
        target_logit += tl.load(bias_ptr + target).to(tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    shift = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, V, BLOCK_N):
        offs_v = start + tl.arange(0, BLOCK_N)
        mask_v = offs_v < V
        logits_ptrs = logits_ptr + rows[:, None] * stride_lm + offs_v[None, :]
        logits = tl.load(logits_ptrs, mask=mask_v[None, :], other=float("-inf"))
        if HAS_BIAS:
            logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
        row_max = tl.maximum(row_max, tl.max(logits, 1))
        old_shift = shift
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)  # -inf - -inf would be NaN
        row_sum = row_sum * tl.exp(old_shift - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
    tl.store(row_max_ptr + rows, row_max, mask=mask_m)
    tl.store(row_sum_ptr + rows, row_sum, mask=mask_m)
    tl.store(target_logit_ptr + rows, target_logit, mask=mask_m)
    if HAS_GRAD:
        lse = row_max + tl.log(row_sum)
        row_coef = tl.load(coef_ptr + rows) * (1 + 2 * z_loss * lse) / row_sum
        for start in range(0, V, BLOCK_N):
            offs_v = start + tl.arange(0, BLOCK_N)
            mask_v = offs_v < V
            logits_ptrs = logits_ptr + rows[:, None] * stride_lm + offs_v[None, :]
            logits = tl.load(logits_ptrs, mask=mask_v[None, :], other=float("-inf"))
            if HAS_BIAS:
                logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
            grad = tl.exp(logits - shift[:, None]) * row_coef[:, None]
            # the target's share is added in float32 by the caller
            grad = tl.where(offs_v[None, :] == target[:, None], 0.0, grad)
            grad_ptrs = grad_ptr + rows[:, None] * stride_gm + offs_v[None, :]
            # a gradient of half the size lands on logits that other threads have still to read
            tl.debug_barrier()
            tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_v[None, :])
