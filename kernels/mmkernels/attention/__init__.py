"""Attention under structured masks that are never stored."""

from mmkernels.attention.op import attention
from mmkernels.attention.reference import QKNorm, attention_ref

__all__ = ["QKNorm", "attention", "attention_ref"]
