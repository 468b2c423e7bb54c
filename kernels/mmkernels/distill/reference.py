"""Eager distillation loss, in the dtype it is given: what the other paths are held to."""

import torch
from torch import Tensor


def distillation_loss_ref(
    student: Tensor,
    teacher: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    center: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """`-sum_c softmax((teacher - center) / teacher_temp)_c log_softmax(student / student_temp)_c` of each row."""
    with torch.no_grad():
        target = ((teacher if center is None else teacher - center) / teacher_temp).softmax(1)
    log_p = (student / student_temp).log_softmax(1)
    # a class that both have masked adds nothing, where 0 * -inf would be no number
    losses = -torch.where(target == 0, 0.0, target * log_p).sum(1)
    if reduction == "mean":
        return losses.sum() / max(len(losses), 1)
    return losses.sum() if reduction == "sum" else losses
