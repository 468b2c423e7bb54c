"""Losses over tensors; the distributed ones are exact on any number of ranks."""

from mmcore.losses.contrastive import global_contrastive_loss
from mmcore.losses.drop_in import BackpropType, ClipLoss, ContrastiveLossWithTemperature, SigLipLoss
from mmcore.losses.sigmoid import global_sigmoid_loss
from mmcore.losses.token import global_token_contrastive_loss

__all__ = [
    "BackpropType",
    "ClipLoss",
    "ContrastiveLossWithTemperature",
    "SigLipLoss",
    "global_contrastive_loss",
    "global_sigmoid_loss",
    "global_token_contrastive_loss",
]
