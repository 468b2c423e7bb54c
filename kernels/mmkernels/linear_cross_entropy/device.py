"""The linear cross-entropy's kernel: what runs on the GPU; kernel.py launches it."""

import triton
import triton.language as tl


# rows come in any number and begin anywhere: nothing is compiled anew for it
@triton.jit(
    do_not_specialize=["M", "ignore_index"],
    do_not_specialize_on_alignment=["targets_ptr", "coef_ptr", "mean_logit_ptr", "loss_ptr", "target_coef_ptr"],
)
def _linear_cross_entropy_fwd_kernel(
    logits_ptr,  # [M, V]
    grad_ptr,  # [M, V], in the memory of the logits
    bias_ptr,  # [V]
    targets_ptr,  # [M]
    coef_ptr,
    mean_logit_ptr,
    loss_ptr,
    target_coef_ptr,
    stride_lm,
    stride_gm,
    M,
    V,
    ignore_index,
    unit,
    smoothing,
    z_loss,
    HAS_BIAS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)  # beyond the last row, that row again
    target = tl.load(targets_ptr + rows)
    is_kept = target != ignore_index
    is_inside = (target >= 0) & (target < V)
    target = tl.minimum(tl.maximum(target, 0), V - 1)
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
    # lse = row_max + log(row_sum) less the target's logit, in float64: a small loss is a difference of large numbers
    log_sum = tl.log(row_sum.to(tl.float64))
    lse = row_max.to(tl.float64) + log_sum
    loss = (row_max.to(tl.float64) - target_logit.to(tl.float64)) + log_sum
    probability = tl.exp(-loss)
    loss += z_loss * lse * lse
    if HAS_MEAN:
        loss += smoothing * (target_logit - tl.load(mean_logit_ptr + rows))
    # a target outside the vocabulary is not looked for on the host
    loss = tl.where(is_kept, tl.where(is_inside, loss, float("nan")), 0.0)
    tl.store(loss_ptr + rows, loss.to(tl.float32), mask=mask_m)
    if HAS_GRAD:
        coef = tl.load(coef_ptr + rows)
        coef = tl.where(is_kept, tl.where(is_inside, coef, float("nan")), 0.0)
        of_z = 2 * z_loss * lse
        # dL/dlogit of the target, less the smoothing's part: applied in float32, apart from the rounded tiles
        target_coef = ((probability - 1) + smoothing + probability * of_z) * coef
        tl.store(target_coef_ptr + rows, target_coef.to(tl.float32), mask=mask_m)
        row_coef = unit * coef * (1 + of_z).to(tl.float32) / row_sum
        row_coef = tl.where(is_kept, row_coef, 0.0)
        for start in range(0, V, BLOCK_N):
            offs_v = start + tl.arange(0, BLOCK_N)
            mask_v = offs_v < V
            logits_ptrs = logits_ptr + rows[:, None] * stride_lm + offs_v[None, :]
            logits = tl.load(logits_ptrs, mask=mask_v[None, :], other=float("-inf"))
            if HAS_BIAS:
                logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
            grad = tl.exp(logits - shift[:, None]) * row_coef[:, None]
            grad = tl.where(offs_v[None, :] == target[:, None], 0.0, grad)
            grad_ptrs = grad_ptr + rows[:, None] * stride_gm + offs_v[None, :]
            # a gradient of half the size lands on logits that other threads have still to read
            tl.debug_barrier()
            tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_v[None, :])
