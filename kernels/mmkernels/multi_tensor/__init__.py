"""Updates and sums of lists of tensors in one launch."""

from mmkernels.multi_tensor.adamw import adamw_update_
from mmkernels.multi_tensor.ema import ema_update_
from mmkernels.multi_tensor.ewc import ewc_penalty, fisher_accumulate_
from mmkernels.multi_tensor.norm import clip_, global_norm
from mmkernels.multi_tensor.packnet import apply_masks_
from mmkernels.multi_tensor.reference import (
    adamw_update_ref_,
    apply_masks_ref_,
    clip_ref_,
    ema_update_ref_,
    ewc_penalty_ref,
    fisher_accumulate_ref_,
    global_norm_ref,
)

__all__ = [
    "adamw_update_",
    "adamw_update_ref_",
    "apply_masks_",
    "apply_masks_ref_",
    "clip_",
    "clip_ref_",
    "ema_update_",
    "ema_update_ref_",
    "ewc_penalty",
    "ewc_penalty_ref",
    "fisher_accumulate_",
    "fisher_accumulate_ref_",
    "global_norm",
    "global_norm_ref",
]
