"""What transformers calls the weights and settings of image towers that several of its models have."""

from mmcore.weights.layout import under
from mmcore.weights.settings import transformers_keys

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
CLIP_BLOCK_SETTINGS = transformers_keys(
    width=768, num_layers=12, num_heads=12, mlp_dim=3072, activation="quick_gelu", norm_eps=1e-5
)
CLIP_TOWER_SETTINGS = transformers_keys(image_size=224, patch_size=32) | CLIP_BLOCK_SETTINGS
"""CLIPVisionConfig's, for a `VisionConfig`."""
