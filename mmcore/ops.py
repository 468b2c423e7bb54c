"""The operations that models and losses are written on; each comes from `mmkernels`, nothing else does."""

from mmkernels import contrastive_loss, contrastive_stats

__all__ = ["contrastive_loss", "contrastive_stats"]
