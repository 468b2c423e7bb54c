"""The distillation kernels: what runs on the GPU; kernel.py launches them."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _fold(x, old_max, old_sum):
    """Online maximum and `sum exp(x - max)`; a block of -inf alone adds nothing."""
    new_max = tl.maximum(old_max, tl.max(x, 0))
    shift = tl.maximum(new_max, -3.0e38)
    exponentials = tl.exp(x - shift)
    new_sum = old_sum * tl.exp(old_max - shift) + tl.sum(exponentials, 0)
    return new_max, new_sum, exponentials, shift


# batches come in any number of rows: nothing is compiled anew for it
@triton.jit(do_not_specialize=["B"])
def _distillation_loss_fwd_kernel(
    student_ptr,
    teacher_ptr,
    center_ptr,
    student_temp_ptr,
    teacher_temp_ptr,
    parts_ptr,  # [5, splits, B]: both maxima and sums, and sum exp(y - max) (x - max)
    stride_sb,
    stride_tb,
    B,
    C,
    cols_per_split,
    HAS_CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_b, pid_n = tl.program_id(0), tl.program_id(1)
    student_temp = tl.load(student_temp_ptr).to(tl.float32)
    teacher_temp = tl.load(teacher_temp_ptr).to(tl.float32)
    student_row = student_ptr + pid_b.to(tl.int64) * stride_sb
    teacher_row = teacher_ptr + pid_b.to(tl.int64) * stride_tb
    first_n = pid_n * cols_per_split
    last_n = tl.minimum(first_n + cols_per_split, C)
    student_max, teacher_max = float("-inf"), float("-inf")
    student_sum, teacher_sum, cross = 0.0, 0.0, 0.0
    for start_n in range(first_n, last_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last_n
        x = tl.load(student_row + offs_n, mask=mask_n, other=float("-inf")).to(tl.float32) / student_temp
        y = tl.load(teacher_row + offs_n, mask=mask_n, other=float("-inf")).to(tl.float32)
        if HAS_CENTER:
            y -= tl.load(center_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y = y / teacher_temp
        old_max, old_shift = teacher_max, tl.maximum(student_max, -3.0e38)
        student_max, student_sum, _, shift = _fold(x, student_max, student_sum)
        old_sum = teacher_sum
        teacher_max, teacher_sum, weights, teacher_shift = _fold(y, teacher_max, teacher_sum)
        # what was summed relative to the old maxima, relative to the new
        shrink = tl.exp(old_max - teacher_shift)
        moved = tl.where(old_sum == 0.0, 0.0, old_sum * (old_shift - shift))
        # where both are masked 0 * -inf would be no number
        products = tl.where(weights == 0.0, 0.0, weights * (x - shift))
        cross = (cross + moved) * shrink + tl.sum(products, 0)
    part = parts_ptr + pid_n.to(tl.int64) * B + pid_b
    plane = tl.num_programs(1).to(tl.int64) * B
    tl.store(part, student_max)
    tl.store(part + plane, student_sum)
    tl.store(part + 2 * plane, teacher_max)
    tl.store(part + 3 * plane, teacher_sum)
    tl.store(part + 4 * plane, cross)


@triton.jit(do_not_specialize=["B"])
def _distillation_loss_bwd_kernel(
    student_ptr,
    teacher_ptr,
    center_ptr,
    student_temp_ptr,
    teacher_temp_ptr,
    stats_ptr,  # [4, B]
    grad_ptr,  # [B]
    dstudent_ptr,  # [B, C]
    stride_sb,
    stride_tb,
    stride_db,
    B,
    C,
    HAS_CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_b, pid_n = tl.program_id(0), tl.program_id(1)
    student_temp = tl.load(student_temp_ptr).to(tl.float32)
    teacher_temp = tl.load(teacher_temp_ptr).to(tl.float32)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    row = pid_b.to(tl.int64)
    x = tl.load(student_ptr + row * stride_sb + offs_n, mask=mask_n, other=0.0).to(tl.float32) / student_temp
    y = tl.load(teacher_ptr + row * stride_tb + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_CENTER:
        y -= tl.load(center_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y = y / teacher_temp
    scale = tl.load(grad_ptr + row) / student_temp
    stat = stats_ptr + row
    p = tl.exp(x - tl.load(stat)) * (scale / tl.load(stat + B))
    q = tl.exp(y - tl.load(stat + 2 * B)) * (scale / tl.load(stat + 3 * B))
    out = (p - q).to(dstudent_ptr.dtype.element_ty)
    tl.store(dstudent_ptr + row * stride_db + offs_n, out, mask=mask_n)
