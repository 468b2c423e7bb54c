"""Small shapes on a CPU: the reference on widened operands, every product stored."""

from torch import Tensor

from mmkernels._device import runs_triton
from mmkernels._numerics import widen
from mmkernels.maxsim.reference import maxsim_ref

# Up to so many products the registered op's own call costs more than it saves.
EAGER_PRODUCTS = 1 << 15


def is_faster(q: Tensor, d: Tensor) -> bool:
    """A pure function of shape."""
    num_products = q.shape[0] * q.shape[1] * d.shape[0] * d.shape[1]
    return not (q.is_cuda or runs_triton(q)) and 0 < num_products < EAGER_PRODUCTS


def maxsim_eager(q: Tensor, d: Tensor, *, q_mask: Tensor | None, d_mask: Tensor | None) -> Tensor:
    """What a token that does not count holds goes nowhere: those of `q` hold zeros."""
    if d_mask is not None:
        d = d.masked_fill(~d_mask[:, :, None], 0)
    return maxsim_ref(widen(q), widen(d), q_mask=q_mask, d_mask=d_mask)
