"""transformers' models on our operations: their attention alone, or all that is faster."""

from mmcore.integrations.attention_interface import NAME, attention_forward, attention_mask, register
from mmcore.integrations.whole_model import Accelerated, accelerate, restore

__all__ = ["NAME", "Accelerated", "accelerate", "attention_forward", "attention_mask", "register", "restore"]
