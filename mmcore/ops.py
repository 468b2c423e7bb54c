"""The operations that models are written on; each comes from `mmkernels`, nothing else does."""

from mmkernels import (
    adamw_update_,
    attention,
    contrastive_loss,
    distillation_loss,
    ema_update_,
    linear_cross_entropy,
    masks,
    maxsim,
)
from mmkernels.pieces import CALLS_ONEDNN, PRODUCTS, accumulator, is_transforming, matmul_nt, require, untransformed

__all__ = [
    "CALLS_ONEDNN",
    "PRODUCTS",
    "accumulator",
    "adamw_update_",
    "attention",
    "contrastive_loss",
    "distillation_loss",
    "ema_update_",
    "is_transforming",
    "linear_cross_entropy",
    "masks",
    "matmul_nt",
    "maxsim",
    "require",
    "untransformed",
]
