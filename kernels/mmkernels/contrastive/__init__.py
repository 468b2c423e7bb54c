"""The softmax over a similarity matrix that is never stored."""

from mmkernels.contrastive.loss import contrastive_loss
from mmkernels.contrastive.op import contrastive_lse, contrastive_stats
from mmkernels.contrastive.problem import ContrastiveStats
from mmkernels.contrastive.reference import contrastive_loss_ref, contrastive_lse_ref, contrastive_stats_ref

__all__ = [
    "ContrastiveStats",
    "contrastive_loss",
    "contrastive_loss_ref",
    "contrastive_lse",
    "contrastive_lse_ref",
    "contrastive_stats",
    "contrastive_stats_ref",
]
