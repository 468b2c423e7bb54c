"""Losses over tensors; the distributed ones are exact on any number of ranks."""

from mmcore.losses.contrastive import global_contrastive_loss

__all__ = ["global_contrastive_loss"]
