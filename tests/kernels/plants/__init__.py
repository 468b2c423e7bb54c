"""Every op's planted bugs."""

from tests.kernels.plants.attention import PLANTS as ATTENTION
from tests.kernels.plants.contrastive import PLANTS as CONTRASTIVE
from tests.kernels.plants.distill import PLANTS as DISTILL
from tests.kernels.plants.linear_cross_entropy import PLANTS as LINEAR_CROSS_ENTROPY
from tests.kernels.plants.multi_tensor import (
    ADAMW_PLANTS,
    EMA_PLANTS,
    EWC_PLANTS,
    MASKS_PLANTS,
    NORM_PLANTS,
)
from tests.kernels.plants.sigmoid import PLANTS as SIGMOID
from tests.kernels.plants.token_contrastive import PLANTS as TOKEN_CONTRASTIVE

ALL = {
    "attention": ATTENTION,
    "contrastive": CONTRASTIVE,
    "distill": DISTILL,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
    "adamw_update": ADAMW_PLANTS,
    "apply_masks": MASKS_PLANTS,
    "ema_update": EMA_PLANTS,
    "ewc": EWC_PLANTS,
    "norm": NORM_PLANTS,
    "sigmoid": SIGMOID,
    "token_contrastive": TOKEN_CONTRASTIVE,
}
