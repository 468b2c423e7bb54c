"""Every enrolled op: what the contract test runs and what bench times."""

from mmkernels._spec import OpSpec
from mmkernels.attention.spec import SPECS as ATTENTION
from mmkernels.contrastive.spec import SPECS as CONTRASTIVE
from mmkernels.distill.spec import SPECS as DISTILL
from mmkernels.linear_cross_entropy.spec import SPECS as LINEAR_CROSS_ENTROPY
from mmkernels.multi_tensor.spec import SPECS as MULTI_TENSOR
from mmkernels.sigmoid.spec import SPECS as SIGMOID
from mmkernels.token_contrastive.spec import SPECS as TOKEN_CONTRASTIVE

SPECS: tuple[OpSpec, ...] = (
    *ATTENTION,
    *CONTRASTIVE,
    *DISTILL,
    *LINEAR_CROSS_ENTROPY,
    *MULTI_TENSOR,
    *SIGMOID,
    *TOKEN_CONTRASTIVE,
)
