"""The softmax over a similarity matrix that is never stored."""

from mmkernels.contrastive.op import contrastive_loss, contrastive_stats
from mmkernels.contrastive.reference import contrastive_loss_ref, contrastive_stats_ref

__all__ = ["contrastive_loss", "contrastive_loss_ref", "contrastive_stats", "contrastive_stats_ref"]
