"""Attention under structured masks that are never stored."""

from mmkernels.attention.op import attention
from mmkernels.attention.positions import alibi_slopes, rotary, xpos
from mmkernels.attention.reference import QKNorm, attention_ref

__all__ = ["QKNorm", "alibi_slopes", "attention", "attention_ref", "rotary", "xpos"]
