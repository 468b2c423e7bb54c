"""Differentiable distillation loss, registered with torch."""

import torch
from torch import Tensor

from mmkernels._autograd import has_no_derivative, reverse_only
from mmkernels._checks import accumulator, check_beside, check_dtype, require, scalar_tensor
from mmkernels._device import Kernels, runs_triton
from mmkernels.distill import blockwise, eager

kernel = Kernels("mmkernels.distill")

OP = "distillation_loss"
REDUCTIONS = ("none", "mean", "sum")
# Under so many logits the registered op's own call is what costs.
EAGER_LOGITS = 1 << 15


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    center: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy `-sum_c softmax((teacher - center) / teacher_temp)_c log_softmax(student / student_temp)_c`.

    DINO's and iBOT's loss between two views, LwF's and knowledge distillation's between two networks (whose
    factor T^2 is the caller's). No softmax and no float32 copy of the logits is stored. The logits of DINO's
    crops come as rows: for each pair of a student's and another teacher's crop, the same `[B, C]` rows. It
    computes in float32 under autocast too.

    Args:
        student: logits `[B, C]`, float32, float16, bfloat16 or float64, any strides.
        teacher: logits `[B, C]`, a constant, of any of these dtypes.
        student_temp: what the student's logits are divided by: above 0, a float or a tensor of one element; a
            constant. A tensor on a GPU is not checked: that would wait for the device.
        teacher_temp: the teacher's, likewise.
        center: `[C]`, a constant, taken off the teacher's logits; None = zero.
        reduction: "mean" over rows, "sum", or "none" for `[B]`.

    Returns:
        The loss, a scalar or `[B]`: float32, accumulated in float32 (float64 for a student in float64). A
        class whose logit is -inf for both adds nothing; for the student alone it makes the loss inf. An empty
        batch gives 0.

    Raises:
        ValueError: a wrong shape, dtype, device or temperature, or a temperature that wants a gradient.

    Reference: `distillation_loss_ref`. Papers: arXiv:2104.14294, arXiv:2111.07832, arXiv:1606.09282,
    arXiv:1503.02531.
    """
    _check(student, teacher, center, reduction)
    student_temp = _temperature("student_temp", student_temp, student)
    teacher_temp = _temperature("teacher_temp", teacher_temp, student)
    teacher = teacher.detach()
    center = None if center is None else center.detach()
    with torch.autocast(student.device.type, enabled=False):
        if eager.is_faster(student):
            return eager.distillation_loss_eager(student, teacher, student_temp, teacher_temp, center, reduction)
        reverse_only(OP, "mmkernels.distillation_loss_ref", student=student)
        losses = _distillation_loss_fwd(student, teacher, student_temp, teacher_temp, center)[0]
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / max(student.shape[0], 1)


@torch.library.custom_op("mmkernels::distillation_loss_fwd", mutates_args=())
def _distillation_loss_fwd(
    student: Tensor, teacher: Tensor, student_temp: Tensor, teacher_temp: Tensor, center: Tensor | None
) -> tuple[Tensor, Tensor]:
    path = kernel if runs_triton(student) else blockwise
    return path.distillation_loss_fwd(student, teacher, student_temp, teacher_temp, center)


@_distillation_loss_fwd.register_fake
def _(
    student: Tensor, teacher: Tensor, student_temp: Tensor, teacher_temp: Tensor, center: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(student.dtype)
    return student.new_empty(student.shape[0], dtype=dtype), student.new_empty(4, student.shape[0], dtype=dtype)


@torch.library.custom_op("mmkernels::distillation_loss_bwd", mutates_args=())
def _distillation_loss_bwd(
    student: Tensor,
    teacher: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    center: Tensor | None,
    stats: Tensor,
    grad: Tensor,
) -> Tensor:
    path = kernel if runs_triton(student) else blockwise
    return path.distillation_loss_bwd(student, teacher, student_temp, teacher_temp, center, stats, grad.contiguous())


@_distillation_loss_bwd.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    center: Tensor | None,
    stats: Tensor,
    grad: Tensor,
) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor, _stats: None):
    *inputs, stats = ctx.saved_tensors
    return _distillation_loss_bwd(*inputs, stats, grad), None, None, None, None


_distillation_loss_fwd.register_autograd(_backward, setup_context=_setup_context)
_distillation_loss_bwd.register_autograd(has_no_derivative(OP, "mmkernels.distillation_loss_ref"))


def _check(student: Tensor, teacher: Tensor, center: Tensor | None, reduction: str) -> None:
    shape = list(student.shape)
    require(OP, student.ndim == 2, "student must be [B, C], got shape {}", shape)
    require(OP, shape[1] > 0, "student must have at least one class, got shape {}", shape)
    check_dtype(OP, "student", student)
    require(
        OP,
        teacher.shape == student.shape,
        "teacher must have the shape of student, {}, got {}",
        shape,
        list(teacher.shape),
    )
    check_dtype(OP, "teacher", teacher)
    check_beside(OP, "teacher", teacher, "student", student)
    if center is not None:
        of_center = list(center.shape)
        require(OP, of_center == shape[1:], "center must be [{}], got shape {}", shape[1], of_center)
        check_dtype(OP, "center", center)
        check_beside(OP, "center", center, "student", student)
    require(OP, reduction in REDUCTIONS, "reduction must be one of {}, got {}", REDUCTIONS, reduction)


def _temperature(name: str, value: float | Tensor, student: Tensor) -> Tensor:
    temp = scalar_tensor(OP, name, value, "student", student)
    require(OP, not temp.requires_grad, "{} must be a constant, got one that requires a gradient", name)
    if not isinstance(value, Tensor):
        require(OP, value > 0, "{} must be above 0, got {}", name, value)
    elif not temp.is_cuda and not torch.compiler.is_compiling():
        require(OP, temp.item() > 0, "{} must be above 0, got {}", name, temp.item())
    return temp.reshape(())
