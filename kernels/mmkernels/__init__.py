"""Fused operations for vision-language models: Triton kernels, blockwise ATen twins and eager references."""

from mmkernels.contrastive import (
    contrastive_loss,
    contrastive_loss_ref,
    contrastive_stats,
    contrastive_stats_ref,
)
from mmkernels.token_contrastive import (
    TokenContrastiveStats,
    token_contrastive_loss,
    token_contrastive_loss_ref,
    token_contrastive_stats,
    token_contrastive_stats_ref,
)

__all__ = [
    "TokenContrastiveStats",
    "contrastive_loss",
    "contrastive_loss_ref",
    "contrastive_stats",
    "contrastive_stats_ref",
    "token_contrastive_loss",
    "token_contrastive_loss_ref",
    "token_contrastive_stats",
    "token_contrastive_stats_ref",
]
