"""Distillation in Triton: each pass reads the logits once, and stores no more than its result."""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
from torch import Tensor

from mmkernels._launch import Launch, constant_launch, launch
from mmkernels.distill.device import _distillation_loss_bwd_kernel, _distillation_loss_fwd_kernel

# Programs that keep every processor's memory pipes full; fewer rows are cut along the classes.
MIN_PROGRAMS = 264
# A program walks a row, or a part of one, in blocks of block_n.
LAUNCH = Launch(1, 2048, 1, 8, 1)


def distillation_loss_fwd(
    student: Tensor, teacher: Tensor, student_temp: Tensor, teacher_temp: Tensor, center: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of each row `[B]`, and of both sides maximum and sum `[4, B]`."""
    num_rows, num_cols = student.shape
    config = constant_launch(LAUNCH, student)
    blocks = triton.cdiv(num_cols, config.block_n)
    blocks_per_split = triton.cdiv(blocks, min(max(MIN_PROGRAMS // max(num_rows, 1), 1), blocks))
    splits = triton.cdiv(blocks, blocks_per_split)
    parts = student.new_empty(5, splits, num_rows, dtype=torch.float32)
    student, teacher = _readable(student), _readable(teacher)
    if num_rows:
        launch(
            _distillation_loss_fwd_kernel,
            (num_rows, splits),
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
    config = constant_launch(LAUNCH, student)
    dstudent = torch.empty_like(student, memory_format=torch.contiguous_format)
    student, teacher = _readable(student), _readable(teacher)
    if num_rows:
        launch(
            _distillation_loss_bwd_kernel,
            (num_rows, triton.cdiv(num_cols, config.block_n)),
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
