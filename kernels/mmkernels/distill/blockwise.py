"""Distillation by blocks of rows that stay in cache: what a CPU runs, and float64 on any device.

The statistics of a row are its maximum and `sum exp(x - max)`, of both sides: softmaxes are formed from
these, not from a rounded log-sum-exp.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmkernels import native
from mmkernels._checks import accumulator

# logits of a block: two float32 buffers of so many stay in a core's cache
BLOCK = 1 << 18


def distillation_loss_fwd(
    student: Tensor, teacher: Tensor, student_temp: Tensor, teacher_temp: Tensor, center: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of each row `[B]`, and of both sides maximum and sum `[4, B]`."""
    dtype = accumulator(student.dtype)
    stats = student.new_empty(4, len(student), dtype=dtype)
    losses = student.new_empty(len(student), dtype=dtype)
    center = None if center is None else center.to(dtype).contiguous()
    temps = float(student_temp), float(teacher_temp)
    for rows in _blocks(student):
        s, t = (x[rows].to(dtype).contiguous() for x in (student, teacher))
        if _runs_native(s):
            torch.ops.mmkernels.distill_fwd(s, t, *temps, center, losses[rows], stats[:, rows])
        else:
            _forward(s, t, temps, center, losses[rows], stats[:, rows])
    return losses, stats


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
    dtype = accumulator(student.dtype)
    dstudent = torch.empty_like(student, memory_format=torch.contiguous_format)
    center = None if center is None else center.to(dtype).contiguous()
    temps = float(student_temp), float(teacher_temp)
    for rows in _blocks(student):
        s, t = (x[rows].to(dtype).contiguous() for x in (student, teacher))
        out = dstudent[rows] if dstudent.dtype == dtype else torch.empty_like(s)
        if _runs_native(s):
            torch.ops.mmkernels.distill_bwd(s, t, *temps, center, stats[:, rows], grad[rows], out)
        else:
            _backward(s, t, temps, center, stats[:, rows], grad[rows], out)
        if dstudent.dtype != dtype:
            dstudent[rows] = out
    return dstudent


def _blocks(x: Tensor) -> Iterator[slice]:
    """Whole rows: all at once for the native step, which needs no buffers, else as many as a block holds."""
    num_rows = max(len(x) if _runs_native(x) else BLOCK // x.shape[1], 1)
    for first in range(0, len(x), num_rows):
        yield slice(first, first + num_rows)


def _runs_native(x: Tensor) -> bool:
    return native.AVAILABLE and x.is_cpu and x.dtype == torch.float32


def _shifted(x: Tensor, temp: float, largest: Tensor) -> Tensor:
    return torch.div(x, temp).sub_(largest[:, None])


def _forward(
    student: Tensor, teacher: Tensor, temps: tuple[float, float], center: Tensor | None, losses: Tensor, stats: Tensor
) -> None:
    teacher = teacher if center is None else teacher - center
    for i, (x, temp) in enumerate(zip((student, teacher), temps)):
        torch.div(x.amax(1), temp, out=stats[2 * i])
    x, y = _shifted(student, temps[0], stats[0]), _shifted(teacher, temps[1], stats[2]).exp_()
    stats[3] = y.sum(1)
    # 0 * -inf is a class that both have masked; what is not a number is in the sums too
    cross = torch.mul(x, y, out=y).nan_to_num_(0.0, torch.inf, -torch.inf).sum(1)
    stats[1] = x.exp_().sum(1)
    torch.sub(stats[1].log(), cross.div_(stats[3]), out=losses)


def _backward(
    student: Tensor,
    teacher: Tensor,
    temps: tuple[float, float],
    center: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    out: Tensor,
) -> None:
    teacher = teacher if center is None else teacher - center
    scale = grad / temps[0]
    y = _shifted(teacher, temps[1], stats[2]).exp_().mul_((scale / stats[3])[:, None])
    x = _shifted(student, temps[0], stats[0]).exp_().mul_((scale / stats[1])[:, None])
    torch.sub(x, y, out=out)
