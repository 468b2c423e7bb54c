"""The softmax over similarities that are maxima over tokens, none of them ever stored."""

from mmkernels.token_contrastive.loss import token_contrastive_loss
from mmkernels.token_contrastive.op import token_contrastive_stats
from mmkernels.token_contrastive.problem import TokenContrastiveStats
from mmkernels.token_contrastive.reference import token_contrastive_loss_ref, token_contrastive_stats_ref

__all__ = [
    "TokenContrastiveStats",
    "token_contrastive_loss",
    "token_contrastive_loss_ref",
    "token_contrastive_stats",
    "token_contrastive_stats_ref",
]
