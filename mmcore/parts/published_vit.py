"""Image towers in the files that their authors published, whose names are timm's: DINO, iBOT, DINOv2 and others."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmcore.nn import interpolate_positions
from mmcore.parts.vit import Tower, VisionConfig, ViT
from mmcore.parts.vit_names import TIMM_BLOCK
from mmcore.weights.files import PARTS, read_weights
from mmcore.weights.layout import Layout, leading, under

_OP = "load_published"
TIMM_TOWER = {
    "class_embedding": leading("cls_token", 2),
    "position_embedding": leading("pos_embed", 1),
    "registers": leading("register_tokens", 1),
    "mask_token": leading("mask_token", 1),
    "patch_embed": "patch_embed.proj",
    **under("transformer.blocks.{i}", "blocks.{i}", TIMM_BLOCK),
    "norm_post": "norm",
}
"""Of DINOv2's code, and of DINO's, iBOT's and timm's as far as they have these parts, for a `ViT`."""
LAYOUT = Layout(TIMM_TOWER, unread=("head", "fc"), what="a published file")
_SIDE = 224
_HEAD_WIDTH = 64


def read_published(file: Path, part: str | None = None) -> dict[str, Tensor] | None:
    """Weights of a published file, .pth or .safetensors, by the names in `TIMM_TOWER`, with heads beside them; None
    where it has no such tower.

    Args:
        file: of a tower, or a checkpoint of a training, of which it is the teacher.
        part: "student" for that of a checkpoint.
    """
    parts = PARTS if part is None else (part,)
    return _by_timms_names(read_weights(_OP, file, parts=parts))


def _by_timms_names(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    named = {_plain(name): x for name, x in state.items()}
    return named if "cls_token" in named and "patch_embed.proj.weight" in named else None


def _plain(name: str) -> str:
    """Without what wraps a module, DINOv2's chunks of blocks, and iBOT's name of the mask token."""
    name = re.sub(r"^(module\.)?(backbone\.)?", "", name)
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return "mask_token" if name == "masked_embed" else name


def published_config(state: Mapping[str, Tensor]) -> VisionConfig:
    """The shape of a tower by its weights, for square images with a position for each patch. Heads are 64 wide, as in
    all that are published, norms have an eps of 1e-6, and ImageNet's mean and deviation are taken off."""
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    has_swiglu, registers = "blocks.0.mlp.w12.weight" in state, state.get("register_tokens")
    hidden = state["blocks.0.mlp.w3.weight" if has_swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    sizes = side * patch, patch, width, depth, max(1, width // _HEAD_WIDTH), hidden
    return VisionConfig(
        *sizes,
        norm_eps=1e-6,
        has_norm_pre=False,
        has_patch_bias=True,
        has_final_norm=True,
        num_registers=0 if registers is None else registers.shape[1],
        has_mask_token="mask_token" in state,
        layer_scale=1.0 if "blocks.0.ls1.gamma" in state else None,
        has_swiglu=has_swiglu,
        antialias=registers is not None,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )


def published_vit(weights: Mapping[str, Tensor]) -> Tower | None:
    """The image tower of what a published file of DINO, iBOT or DINOv2 holds, without a mask token; None of others.

    One with positions for more than 224 pixels, as DINOv2's for 518, is of 224, its positions resampled as its authors
    do. A ValueError of missing or unknown names.
    """
    state = _by_timms_names(weights)
    if state is None:
        return None
    config = published_config(state)
    with torch.device("meta"):
        wanted = ViT(config).state_dict()
    heads = {name.split(".")[0] for name in state if name.split(".")[0].endswith("_head")}
    found = LAYOUT.read(_OP, state, wanted, unread=tuple(heads))
    if config.image_size > _SIDE and _SIDE % config.patch_size == 0:
        config, name = replace(config, image_size=_SIDE), "position_embedding"
        found[name] = interpolate_positions(found[name], config.num_patches, antialias=config.antialias)
    return Tower(config, found).bare
