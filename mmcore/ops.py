"""The operations that models and losses are written on; each comes from `mmkernels`, nothing else does.

Beside the public ones stand the pieces of the losses that their distributed forms are composed of.
"""

from mmkernels import ContrastiveStats, contrastive_loss, sigmoid_loss
from mmkernels._checks import accumulator, require
from mmkernels._numerics import log_sum_exp
from mmkernels.contrastive.labels import first_match, label_sums
from mmkernels.contrastive.loss import LinearMeans, Match, Options, checked_inputs, pair_losses, reduce
from mmkernels.contrastive.op import broken_claim
from mmkernels.contrastive.problem import NO_UNDERFLOW_SCALE, grad_total, mean_cosine, poisoned
from mmkernels.contrastive.problem import Problem as ContrastiveProblem
from mmkernels.sigmoid.op import checked_operands as checked_sigmoid_operands

__all__ = [
    "NO_UNDERFLOW_SCALE",
    "ContrastiveProblem",
    "ContrastiveStats",
    "LinearMeans",
    "Match",
    "Options",
    "accumulator",
    "broken_claim",
    "checked_inputs",
    "checked_sigmoid_operands",
    "contrastive_loss",
    "first_match",
    "grad_total",
    "label_sums",
    "log_sum_exp",
    "mean_cosine",
    "pair_losses",
    "poisoned",
    "reduce",
    "require",
    "sigmoid_loss",
]
