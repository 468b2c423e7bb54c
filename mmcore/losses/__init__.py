"""Losses over tensors; the distributed ones are exact on any number of ranks."""

from mmcore.losses.assignment import AssignmentLosses, global_assignment_losses, sinkhorn_knopp
from mmcore.losses.cached import cached_contrastive_step
from mmcore.losses.contrastive import global_contrastive_loss
from mmcore.losses.drop_in import BackpropType, ClipLoss, ContrastiveLossWithTemperature, SigLipLoss
from mmcore.losses.matching import (
    MatchingRows,
    Negatives,
    fetch_rows,
    global_ratio,
    hard_negatives,
    matching_loss,
    matching_rows,
    pair_labels,
    trimmed,
)
from mmcore.losses.self_distillation import gram_loss, koleo_loss, patch_distillation_loss, view_distillation_loss
from mmcore.losses.sigmoid import global_sigmoid_loss
from mmcore.losses.token import global_token_contrastive_loss
from mmcore.losses.transport import transport_distance, transport_plan
from mmcore.losses.views import nt_xent_loss

__all__ = [
    "AssignmentLosses",
    "BackpropType",
    "ClipLoss",
    "ContrastiveLossWithTemperature",
    "MatchingRows",
    "Negatives",
    "SigLipLoss",
    "cached_contrastive_step",
    "fetch_rows",
    "global_assignment_losses",
    "global_contrastive_loss",
    "global_ratio",
    "global_sigmoid_loss",
    "global_token_contrastive_loss",
    "gram_loss",
    "hard_negatives",
    "koleo_loss",
    "matching_loss",
    "matching_rows",
    "nt_xent_loss",
    "pair_labels",
    "patch_distillation_loss",
    "sinkhorn_knopp",
    "transport_distance",
    "transport_plan",
    "trimmed",
    "view_distillation_loss",
]
