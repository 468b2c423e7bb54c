"""Fused operations for vision-language models: Triton kernels, blockwise ATen twins and eager references."""

from mmkernels.contrastive import (
    contrastive_loss,
    contrastive_loss_ref,
    contrastive_stats,
    contrastive_stats_ref,
)

__all__ = ["contrastive_loss", "contrastive_loss_ref", "contrastive_stats", "contrastive_stats_ref"]
