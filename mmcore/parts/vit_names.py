"""What transformers calls the weights and settings of the towers that several of its models have."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmcore.weights.layout import Theirs, leading, under
from mmcore.weights.settings import Key, transformers_keys

CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.{q,k,v}_proj",
    "attn.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""A layer of CLIP's and SigLIP's towers."""
CLIP_TOWER = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embed": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "norm_pre": "pre_layrnorm",  # transformers' own spelling
    **under("transformer.blocks.{i}", "encoder.layers.{i}", CLIP_BLOCK),
}
"""CLIPVisionModel's, for a `ViT`."""


def _as_convolution(x: Tensor) -> Tensor:
    """Weights for patches as rows of (row, column, colour), [D, P P 3], as [D, 3, P, P]."""
    side = math.isqrt(x.shape[-1] // 3)
    is_linear = x.ndim == 2 and x.shape[1] == 3 * side**2
    return x.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2) if is_linear else x


SIGLIP_TOWER = {
    "patch_embed.weight": Theirs("embeddings.patch_embedding.weight", read=_as_convolution),
    "patch_embed.bias": "embeddings.patch_embedding.bias",
    "position_embedding": "embeddings.position_embedding.weight",
    **under("transformer.blocks.{i}", "encoder.layers.{i}", CLIP_BLOCK),
    "norm_post": "post_layernorm",
    "head.probe": leading("head.probe", 2),
    "head.attn.{q,kv}.weight": "head.attention.in_proj_weight",
    "head.attn.{q,kv}.bias": "head.attention.in_proj_bias",
    "head.attn.out": "head.attention.out_proj",
    "head.norm": "head.layernorm",
    "head.mlp": "head.mlp",
}
"""SiglipVisionModel's, for a `ViT` with a `PoolingHead` or without; Siglip2VisionModel's are read too."""
CLIP_TEXT = {
    "token_embedding": "embeddings.token_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    **under("transformer.blocks.{i}", "encoder.layers.{i}", CLIP_BLOCK),
    "norm_final": "final_layer_norm",
}
"""CLIPTextModel's and SiglipTextModel's, for a `TextTower` without its projection."""
POSITION_IDS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Buffers that older files of both have."""
CLIP_BLOCK_SETTINGS = transformers_keys(
    width=768, num_layers=12, num_heads=12, mlp_dim=3072, activation="quick_gelu", norm_eps=1e-5
)
CLIP_TOWER_SETTINGS = transformers_keys(image_size=224, patch_size=32) | CLIP_BLOCK_SETTINGS
"""CLIPVisionConfig's, for a `VisionConfig`."""
TIMM_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.out": "attn.proj",
    "scale1": "ls1.gamma",
    "norm2": "norm2",
    "mlp": "mlp",
    "scale2": "ls2.gamma",
}
"""A layer of timm's vision transformers, of DINO's, iBOT's and DINOv2's."""
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.{query,key,value}",
    "attn.out": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""A layer of ViTModel's and of those that are made of it (MAE, DINO, BEiT), as their files have it."""
VIT_TOWER = {
    "class_embedding": leading("embeddings.cls_token", 2),
    "patch_embed": "embeddings.patch_embeddings.projection",
    "position_embedding": leading("embeddings.position_embeddings", 1),
    **under("transformer.blocks.{i}", "encoder.layer.{i}", VIT_BLOCK),
    "norm_post": "layernorm",
}
"""ViTModel's, for a `ViT`."""
VIT_SETTINGS = CLIP_TOWER_SETTINGS | transformers_keys(patch_size=16, activation="gelu", norm_eps=1e-12)
"""ViTConfig's, for a `VisionConfig`."""
_GELU_TANH = Key(
    "hidden_act",
    "gelu_pytorch_tanh",
    lambda x, _: "gelu_tanh" if x == "gelu_pytorch_tanh" else x,
    lambda x, _: "gelu_pytorch_tanh" if x == "gelu_tanh" else x,
)
SIGLIP_BLOCK_SETTINGS = CLIP_BLOCK_SETTINGS | transformers_keys(norm_eps=1e-6) | {"activation": _GELU_TANH}
SIGLIP_TOWER_SETTINGS = {
    **transformers_keys(patch_size=16),
    "has_margin": Key("image_size", 224, lambda x, ours: x % ours["vision.patch_size"] > 0, lambda *_: ...),
    **transformers_keys(image_size=224),
    **SIGLIP_BLOCK_SETTINGS,
}
"""SiglipVisionConfig's, for the `VisionConfig` of a section "vision"."""


def with_image_size(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a Siglip2Model, which takes images of any shape, for the square ones with a position for each patch;
    others stay."""
    vision = dict(raw.get("vision_config") or {})
    if raw.get("model_type") == "siglip2":
        vision["image_size"] = math.isqrt(vision.get("num_patches", 256)) * vision.get("patch_size", 16)
    return {**raw, "vision_config": vision}
