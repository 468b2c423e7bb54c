"""Small shapes on a CPU: the reference on widened features, every logit stored."""

from torch import Tensor

from mmkernels._device import runs_triton
from mmkernels._numerics import widen
from mmkernels.sigmoid.reference import sigmoid_loss_ref

# Logits that stay in a CPU's cache cost less stored than a call of the registered op.
EAGER_LOGITS = 1 << 15


def is_faster(a: Tensor, b: Tensor) -> bool:
    """A pure function of shape."""
    return not a.is_cuda and not runs_triton(a) and 0 < a.shape[0] * b.shape[0] < EAGER_LOGITS


def sigmoid_loss_eager(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, labels: tuple[Tensor, Tensor] | None, reduction: str
) -> Tensor:
    return sigmoid_loss_ref(widen(a), widen(b), scale, bias, labels=labels, reduction=reduction)
