"""Every enrolled op: what the contract test runs and what bench times."""

from mmkernels._spec import OpSpec
from mmkernels.contrastive.spec import SPECS as CONTRASTIVE
from mmkernels.token_contrastive.spec import SPECS as TOKEN_CONTRASTIVE

SPECS: tuple[OpSpec, ...] = (*CONTRASTIVE, *TOKEN_CONTRASTIVE)
