"""Updates of lists of tensors in one launch."""

from mmkernels.multi_tensor.op import ema_update_
from mmkernels.multi_tensor.reference import ema_update_ref_

__all__ = ["ema_update_", "ema_update_ref_"]
