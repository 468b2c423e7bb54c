"""Small shapes on a CPU: the reference on widened logits, both softmaxes stored."""

from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._device import runs_triton
from mmkernels._numerics import widen
from mmkernels.distill.reference import distillation_loss_ref

EAGER_LOGITS = 1 << 15


def is_faster(student: Tensor) -> bool:
    """A pure function of shape."""
    return not student.is_cuda and not runs_triton(student) and 0 < student.numel() < EAGER_LOGITS


def distillation_loss_eager(
    student: Tensor, teacher: Tensor, student_temp: Tensor, teacher_temp: Tensor, center: Tensor | None, reduction: str
) -> Tensor:
    wide = accumulator(student.dtype)
    constants = (None if x is None else x.to(wide) for x in (teacher, student_temp, teacher_temp, center))
    return distillation_loss_ref(widen(student), *constants, reduction=reduction)  # pyright: ignore[reportArgumentType]
