"""Small shapes on a CPU: the reference on widened features, every product of tokens stored."""

from typing import Any

from torch import Tensor

from mmkernels._device import runs_triton
from mmkernels._numerics import widen
from mmkernels.token_contrastive.reference import token_contrastive_loss_ref

# Products that stay in a CPU's cache are cheaper kept than recomputed.
EAGER_PRODUCTS = 1 << 18


def is_faster(tokens: Tensor, b: Tensor) -> bool:
    """A pure function of shape."""
    num_products = tokens.shape[0] * tokens.shape[1] * b[..., 0].numel()
    return not (tokens.is_cuda or runs_triton(tokens)) and 0 < num_products < EAGER_PRODUCTS


def token_contrastive_loss_eager(tokens: Tensor, b: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """`options` are the arguments of `token_contrastive_loss`."""
    return token_contrastive_loss_ref(widen(tokens), widen(b), scale, **options)
