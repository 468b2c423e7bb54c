"""A sigmoid for each pair of a similarity matrix that is never stored."""

from mmkernels.sigmoid.op import sigmoid_loss
from mmkernels.sigmoid.reference import sigmoid_loss_ref

__all__ = ["sigmoid_loss", "sigmoid_loss_ref"]
