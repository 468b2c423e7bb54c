"""Building blocks of the models: attention of every kind, transformer blocks, position embeddings, momentum."""

from mmcore.nn.attention import Attention, KeyValueCache, KeyValues
from mmcore.nn.batch_norm import BatchNorm
from mmcore.nn.cross import CrossAttention, shared_keys_values
from mmcore.nn.gated import GatedCrossAttentionBlock
from mmcore.nn.linear import Linear, quicken
from mmcore.nn.mlp import ACTIVATIONS, MLP, quick_gelu
from mmcore.nn.momentum import FeatureQueue, MomentumEncoder
from mmcore.nn.multiway import MultiwayBlock
from mmcore.nn.packing import Packing
from mmcore.nn.pooler import AttentionalPooler, PoolingHead
from mmcore.nn.positions import interpolate_positions, sincos_positions
from mmcore.nn.qformer import QFormerBlock
from mmcore.nn.resampler import PerceiverResampler
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
    "MultiwayBlock",
    "Packing",
    "PerceiverResampler",
    "PoolingHead",
    "QFormerBlock",
    "Transformer",
    "interpolate_positions",
    "quick_gelu",
    "quicken",
    "shared_keys_values",
    "sincos_positions",
]
