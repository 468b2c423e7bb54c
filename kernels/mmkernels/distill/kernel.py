"""Distillation in Triton: each pass reads the logits once, and stores no more than its result."""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._launch import launch_config
from mmkernels.distill.launch import MIN_PROGRAMS, TABLE


@triton.jit
def _fold(x, old_max, old_sum):
    """Online maximum and `sum exp(x - max)`; a block of -inf alone adds nothing."""
    new_max = tl.maximum(old_max, tl.max(x, 0))
    shift = tl.maximum(new_max, -3.0e38)
    exponentials = tl.exp(x - shift)
    new_sum = old_sum * tl.exp(old_max - shift) + tl.sum(exponentials, 0)
    return new_max, new_sum, exponentials, shift


@triton.jit
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


@triton.jit
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


def distillation_loss_fwd(
    student: Tensor, teacher: Tensor, student_temp: Tensor, teacher_temp: Tensor, center: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of each row `[B]`, and of both sides maximum and sum `[4, B]`."""
    num_rows, num_cols = student.shape
    config = launch_config(TABLE, "fwd", student)
    blocks = triton.cdiv(num_cols, config.block_n)
    blocks_per_split = triton.cdiv(blocks, min(max(MIN_PROGRAMS // max(num_rows, 1), 1), blocks))
    splits = triton.cdiv(blocks, blocks_per_split)
    parts = student.new_empty(5, splits, num_rows, dtype=torch.float32)
    student, teacher = _readable(student), _readable(teacher)
    if num_rows:
        _distillation_loss_fwd_kernel[(num_rows, splits)](
            student,
            teacher,
            None if center is None else center.float().contiguous(),
            student_temp,
            teacher_temp,
            parts,
            student.stride(0),
            teacher.stride(0),
            num_rows,
            num_cols,
            blocks_per_split * config.block_n,
            HAS_CENTER=center is not None,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return _combined(parts)


def distillation_loss_bwd(
    student: Tensor,
    teacher: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    center: Tensor | None,
    stats: Tensor,
    grad: Tensor,
) -> Tensor:
    """The student's gradient `[B, C]`, in its dtype."""
    num_rows, num_cols = student.shape
    config = launch_config(TABLE, "bwd", student)
    dstudent = torch.empty_like(student, memory_format=torch.contiguous_format)
    student, teacher = _readable(student), _readable(teacher)
    if num_rows:
        _distillation_loss_bwd_kernel[(num_rows, triton.cdiv(num_cols, config.block_n))](
            student,
            teacher,
            None if center is None else center.float().contiguous(),
            student_temp,
            teacher_temp,
            stats,
            grad,
            dstudent,
            student.stride(0),
            teacher.stride(0),
            dstudent.stride(0),
            num_rows,
            num_cols,
            HAS_CENTER=center is not None,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return dstudent


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _combined(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and statistics from the splits' partial sums `[5, splits, B]`."""
    if parts.shape[1] == 1:
        stats, cross = parts[:4, 0], parts[4, 0]
    else:
        maxima, sums, crosses = parts[0:4:2], parts[1:4:2], parts[4]
        largest = maxima.amax(1, keepdim=True)
        shift = largest.clamp(min=torch.finfo(torch.float32).min)
        shrink = (maxima - shift).exp()
        # each split's cross is relative to its own maximum of the student
        moved = torch.where(sums[1] == 0, 0.0, sums[1] * (maxima[0].clamp(min=-3.0e38) - shift[0]))
        cross = ((crosses + moved) * shrink[1]).sum(0)
        total = (sums * shrink).sum(1)
        stats = torch.stack([largest[0, 0], total[0], largest[1, 0], total[1]])
    return stats[1].log() - cross / stats[3], stats.contiguous()
