"""The operations that models and losses are written on; each comes from `mmkernels`, nothing else does.

Beside the public ones stand the pieces of the losses that their distributed forms are composed of.
"""

from mmkernels import (
    ContrastiveStats,
    TokenContrastiveStats,
    adamw_update_,
    attention,
    contrastive_loss,
    ema_update_,
    linear_cross_entropy,
    masks,
    sigmoid_loss,
    token_contrastive_loss,
)
from mmkernels._checks import accumulator, require
from mmkernels._gemm import CALLS_ONEDNN, matmul_nt
from mmkernels._numerics import log_sum_exp
from mmkernels.contrastive.labels import first_match, label_sums
from mmkernels.contrastive.loss import LinearMeans, Match, Options, checked_inputs, pair_losses, reduce
from mmkernels.contrastive.op import broken_claim, gives_nan
from mmkernels.contrastive.problem import NO_UNDERFLOW_SCALE, mean_cosine, poisoned
from mmkernels.contrastive.problem import Problem as ContrastiveProblem
from mmkernels.sigmoid.op import checked_operands as checked_sigmoid_operands
from mmkernels.token_contrastive.loss import cross_entropy as token_cross_entropy
from mmkernels.token_contrastive.op import check_labels as check_token_labels
from mmkernels.token_contrastive.op import check_masks as check_token_masks
from mmkernels.token_contrastive.op import operands as token_operands
from mmkernels.token_contrastive.problem import Problem as TokenProblem
from mmkernels.token_contrastive.problem import label_counts
from mmkernels.token_contrastive.problem import mean_cosine as token_mean_cosine

__all__ = [
    "CALLS_ONEDNN",
    "NO_UNDERFLOW_SCALE",
    "ContrastiveProblem",
    "ContrastiveStats",
    "LinearMeans",
    "Match",
    "Options",
    "TokenContrastiveStats",
    "TokenProblem",
    "accumulator",
    "adamw_update_",
    "attention",
    "broken_claim",
    "check_token_labels",
    "check_token_masks",
    "checked_inputs",
    "checked_sigmoid_operands",
    "contrastive_loss",
    "ema_update_",
    "first_match",
    "gives_nan",
    "label_counts",
    "label_sums",
    "linear_cross_entropy",
    "log_sum_exp",
    "masks",
    "matmul_nt",
    "mean_cosine",
    "pair_losses",
    "poisoned",
    "reduce",
    "require",
    "sigmoid_loss",
    "token_contrastive_loss",
    "token_cross_entropy",
    "token_mean_cosine",
    "token_operands",
]
