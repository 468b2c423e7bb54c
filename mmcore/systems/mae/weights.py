"""MAE's weights and settings as transformers' ViTMAEForPreTraining has them in its files."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmcore.nn import sincos_positions
from mmcore.parts.vit import Tower, ViT, mae_vision
from mmcore.parts.vit_names import VIT_BLOCK, VIT_SETTINGS, VIT_TOWER
from mmcore.systems.mae.model import MAE, MAEConfig
from mmcore.weights.files import read_weights
from mmcore.weights.folder import ModelFolder
from mmcore.weights.layout import Layout, leading, under
from mmcore.weights.settings import Key, Settings

LAYOUT = Layout(
    {
        **under("visual", "vit", VIT_TOWER),
        "decoder.mask_token": leading("decoder.mask_token", 2),
        "decoder.position_embedding": leading("decoder.decoder_pos_embed", 1),
        "decoder.embed": "decoder.decoder_embed",
        **under("decoder.transformer.blocks.{i}", "decoder.decoder_encoder.layer.{i}", VIT_BLOCK),
        "decoder.norm": "decoder.decoder_norm",
        "decoder.head": "decoder.decoder_pred",
    }
)
SETTINGS = Settings(
    {
        **{f"vision.{name}": key for name, key in VIT_SETTINGS.items()},
        "decoder_width": Key("decoder_hidden_size", 512),
        "decoder_layers": Key("decoder_num_hidden_layers", 8),
        "decoder_heads": Key("decoder_num_attention_heads", 16),
        "decoder_mlp_dim": Key("decoder_intermediate_size", 2048),
        "mask_ratio": Key("mask_ratio", 0.75),
        "norm_pix": Key("norm_pix_loss", False),
    },
    kind=MAEConfig,
    kinds={"vision": mae_vision},
    model_types=("vit_mae",),
    must={"qkv_bias": True, "num_channels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    written={"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "dtype": "float32"},
)
FOLDER = ModelFolder("mae", MAE, SETTINGS, LAYOUT)
load_mae, save_mae = FOLDER.load, FOLDER.save

_PUBLISHED_BLOCK = {"norm1": "norm1", "attn.qkv": "attn.qkv", "attn.out": "attn.proj", "norm2": "norm2", "mlp": "mlp"}
_ENCODER = {
    "class_embedding": leading("cls_token", 2),
    "patch_embed": "patch_embed.proj",
    "position_embedding": leading("pos_embed", 1),
    **under("transformer.blocks.{i}", "blocks.{i}", _PUBLISHED_BLOCK),
    "norm_post": "norm",
}
PUBLISHED = Layout(
    {
        **{f"visual.{name}": theirs for name, theirs in _ENCODER.items()},
        "decoder.mask_token": leading("mask_token", 2),
        "decoder.position_embedding": leading("decoder_pos_embed", 1),
        "decoder.embed": "decoder_embed",
        **under("decoder.transformer.blocks.{i}", "decoder_blocks.{i}", _PUBLISHED_BLOCK),
        "decoder.norm": "decoder_norm",
        "decoder.head": "decoder_pred",
    },
    what="a file of MAE's code",
)
"""Names in the files that MAE was published in, with a decoder."""
_HEADS = {768: 12, 1024: 16, 1280: 16}


def read_published(op: str, file: Path, model: MAE) -> dict[str, Tensor]:
    """The weights of a published file by their names in a model, of a file without a decoder those of the encoder; a
    ValueError of another model's."""
    state, wanted = read_weights(op, file), model.state_dict()
    if "decoder_embed.weight" not in state:
        wanted = {name: x for name, x in wanted.items() if name.startswith("visual.")}
    return PUBLISHED.read(op, state, wanted)


def published_encoder(state: Mapping[str, Tensor]) -> Tower | None:
    """The encoder of what a published file holds, known by its decoder or by its fixed positions; None of others."""
    positions = state.get("pos_embed")
    if positions is None or "blocks.0.attn.qkv.weight" not in state or "patch_embed.proj.weight" not in state:
        return None
    width, patch = positions.shape[-1], state["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(max(0, positions.shape[1] - 1))
    is_square = positions.shape[1] == 1 + side**2 and width % 4 == 0
    is_fixed = is_square and torch.allclose(positions[0].float(), sincos_positions(width, side**2), atol=1e-4)
    if "decoder_embed.weight" not in state and not is_fixed:
        return None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    sizes = side * patch, patch, width, depth, _HEADS.get(width, max(1, width // 64))
    vision = mae_vision(*sizes, len(state["blocks.0.mlp.fc1.weight"]))
    with torch.device("meta"):
        wanted = {f"visual.{name}": x for name, x in ViT(vision).state_dict().items()}
    unread = sorted({name.split(".")[0] for name in state if name.startswith(("decoder_", "mask_token", "head"))})
    found = PUBLISHED.read("load_tower", state, wanted, unread=unread)
    return Tower(vision, {name.removeprefix("visual."): x for name, x in found.items()})
