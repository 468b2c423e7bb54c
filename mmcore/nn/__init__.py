"""Building blocks of the models: transformer blocks, patch embedding, position embeddings."""

from mmcore.nn.positions import interpolate_positions
from mmcore.nn.transformer import ACTIVATIONS, MLP, Attention, Block, Transformer, quick_gelu

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "Block",
    "Transformer",
    "interpolate_positions",
    "quick_gelu",
]
