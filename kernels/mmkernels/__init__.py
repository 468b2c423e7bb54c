"""Fused operations for vision-language models: Triton kernels, blockwise ATen twins and eager references."""

from mmkernels import masks
from mmkernels.attention import QKNorm, alibi_slopes, attention, attention_ref, rotary, xpos
from mmkernels.contrastive import (
    ContrastiveStats,
    contrastive_loss,
    contrastive_loss_ref,
    contrastive_lse,
    contrastive_lse_ref,
    contrastive_stats,
    contrastive_stats_ref,
)
from mmkernels.distill import distillation_loss, distillation_loss_ref
from mmkernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from mmkernels.maxsim import maxsim, maxsim_ref
from mmkernels.multi_tensor import (
    adamw_update_,
    adamw_update_ref_,
    apply_masks_,
    apply_masks_ref_,
    clip_,
    clip_ref_,
    ema_update_,
    ema_update_ref_,
    ewc_penalty,
    ewc_penalty_ref,
    fisher_accumulate_,
    fisher_accumulate_ref_,
    global_norm,
    global_norm_ref,
)
from mmkernels.sigmoid import sigmoid_loss, sigmoid_loss_ref
from mmkernels.token_contrastive import (
    TokenContrastiveStats,
    token_contrastive_loss,
    token_contrastive_loss_ref,
    token_contrastive_stats,
    token_contrastive_stats_ref,
)

__all__ = [
    "ContrastiveStats",
    "QKNorm",
    "TokenContrastiveStats",
    "adamw_update_",
    "adamw_update_ref_",
    "alibi_slopes",
    "apply_masks_",
    "apply_masks_ref_",
    "attention",
    "attention_ref",
    "clip_",
    "clip_ref_",
    "contrastive_loss",
    "contrastive_loss_ref",
    "contrastive_lse",
    "contrastive_lse_ref",
    "contrastive_stats",
    "contrastive_stats_ref",
    "distillation_loss",
    "distillation_loss_ref",
    "ema_update_",
    "ema_update_ref_",
    "ewc_penalty",
    "ewc_penalty_ref",
    "fisher_accumulate_",
    "fisher_accumulate_ref_",
    "global_norm",
    "global_norm_ref",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "masks",
    "maxsim",
    "maxsim_ref",
    "rotary",
    "sigmoid_loss",
    "sigmoid_loss_ref",
    "token_contrastive_loss",
    "token_contrastive_loss_ref",
    "token_contrastive_stats",
    "token_contrastive_stats_ref",
    "xpos",
]
