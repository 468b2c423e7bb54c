"""Building blocks of the models: attention of every kind, transformer blocks, position embeddings, momentum. A shape,
mask or size that does not fit, or an argument that is missing or unexpected, raises a ValueError that names it."""

from mmcore.nn.attention import Attention, KeyValueCache, KeyValues
from mmcore.nn.batch_norm import BatchNorm
from mmcore.nn.cross import CrossAttention, GatedCrossAttentionBlock, shared_keys_values
from mmcore.nn.linear import ACTIVATIONS, MLP, Linear, SwiGLU, quick_gelu, quicken
from mmcore.nn.momentum import FeatureQueue, MomentumEncoder
from mmcore.nn.multiway import MultiwayAttention, MultiwayBlock
from mmcore.nn.packing import Packing
from mmcore.nn.pooler import AttentionalPooler, PerceiverResampler, PoolingHead
from mmcore.nn.positions import interpolate_positions, resized_positions, sincos_positions
from mmcore.nn.post_norm import PostNormBlock
from mmcore.nn.qformer import QFormerBlock
from mmcore.nn.relative import MultiwayPositions, RelativePositions
from mmcore.nn.transformer import Block, Transformer

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "AttentionalPooler",
    "BatchNorm",
    "Block",
    "CrossAttention",
    "FeatureQueue",
    "GatedCrossAttentionBlock",
    "KeyValueCache",
    "KeyValues",
    "Linear",
    "MomentumEncoder",
    "MultiwayAttention",
    "MultiwayBlock",
    "MultiwayPositions",
    "Packing",
    "PerceiverResampler",
    "PoolingHead",
    "PostNormBlock",
    "QFormerBlock",
    "RelativePositions",
    "SwiGLU",
    "Transformer",
    "interpolate_positions",
    "quick_gelu",
    "quicken",
    "resized_positions",
    "shared_keys_values",
    "sincos_positions",
]
