"""Updates of lists of tensors in one launch."""

from mmkernels.multi_tensor.adamw import adamw_update_
from mmkernels.multi_tensor.ema import ema_update_
from mmkernels.multi_tensor.reference import adamw_update_ref_, ema_update_ref_

__all__ = ["adamw_update_", "adamw_update_ref_", "ema_update_", "ema_update_ref_"]
