"""Sums over a query's tokens of each one's best product with a document's: late interaction."""

from mmkernels.maxsim.op import maxsim
from mmkernels.maxsim.reference import maxsim_ref

__all__ = ["maxsim", "maxsim_ref"]
