"""The cross-entropy between two tempered softmaxes, neither of which is ever stored."""

from mmkernels.distill.op import distillation_loss
from mmkernels.distill.reference import distillation_loss_ref

__all__ = ["distillation_loss", "distillation_loss_ref"]
