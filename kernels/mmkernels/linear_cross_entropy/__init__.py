"""The cross-entropy of a linear head whose logits are never stored whole."""

from mmkernels.linear_cross_entropy.op import linear_cross_entropy
from mmkernels.linear_cross_entropy.reference import linear_cross_entropy_ref

__all__ = ["linear_cross_entropy", "linear_cross_entropy_ref"]
