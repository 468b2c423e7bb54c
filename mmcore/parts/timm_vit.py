"""timm's vision transformers, `vit_*` and those that are named alike (DeiT): their files, read and written as a ViT of
ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.ops import require
from mmcore.parts.image_tower import ImagePool, ImageTower, PooledTower
from mmcore.parts.vit import VisionConfig
from mmcore.parts.vit_names import TIMM_BLOCK
from mmcore.weights.files import read_json, read_weights
from mmcore.weights.layout import Layout, leading, under

OP = "load_timm"


def tower_rows(pool: ImagePool) -> dict[str, Any]:
    """Their names of a tower that is read so."""
    return {
        "class_embedding": leading("cls_token", 2),
        "patch_embed": "patch_embed.proj",
        "position_embedding": leading("pos_embed", 1),
        "norm_pre": "norm_pre",
        **under("transformer.blocks.{i}", "blocks.{i}", TIMM_BLOCK),
        "norm_post": "fc_norm" if pool == "fc_norm" else "norm",
    }


# heads of the published sizes, by width: those of 64 channels, and the ones that are not
_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}
# of a `VisionConfig`, what a file of timm's tells or does not need to; all else is as its VisionTransformer has it
_HELD = (
    *("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_dim", "activation", "has_norm_pre"),
    *("has_class_token", "layer_scale", "image_mean", "image_std", "interpolation", "fit"),
)
_POOLS: Mapping[str, ImagePool] = {"token": "class", "avg": "mean"}
_UNREAD = ("head", "head_dist", "fc_norm", "norm")
_INCEPTION = (0.5, 0.5, 0.5)


def is_timm(path: Path, state: Mapping[str, Tensor] | None = None) -> bool:
    """Whether a path is a folder of timm's, or a file, which holds `state`, of a ViT by timm's names: with a
    config.json of timm's beside it, a head, or no class token. A bare tower with one is DINO's, iBOT's or DINOv2's."""
    if state is None:
        return path.is_dir() and _is_told(path) and _weights_of(path) is not None
    is_vit = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys()
    has_end = "cls_token" not in state or not {"head.weight", "fc_norm.weight"}.isdisjoint(state)
    return is_vit and (has_end or _is_told(path.parent))


def _is_told(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and "architecture" in read_json(OP, file)


def load_timm_vit(path: Path, state: Mapping[str, Tensor] | None = None) -> PooledTower:
    """Reads a folder of timm's with a ViT, or takes the weights `state` of a file; its shape is that of the weights. A
    config.json of timm's beside them tells how many heads it has, how it is read and what it wants of a picture;
    without one it is the published size of its width, read at its class token or else the mean of its patches, of
    pictures of mean and deviation 0.5. A ValueError of other weights."""
    file = _weights_of(path) if state is None else path
    require(OP, file is not None, "folder must hold a file of weights beside config.json, got {}", path)
    assert file is not None
    state = read_weights(OP, file) if state is None else state
    beside = file.parent / "config.json"
    raw = read_json(OP, beside) if beside.is_file() else {}
    settings = raw if "architecture" in raw else {}
    config, pool = _shape(state, settings, file)
    with torch.device("meta"):
        wanted = ImageTower(config, None, pool).state_dict()
    names = tower_rows(pool)
    unread = [name for name in _UNREAD if name != names["norm_post"]]
    return PooledTower(config, pool, Layout(names, unread=unread, what=str(file)).read(OP, state, wanted))


def _weights_of(folder: Path) -> Path | None:
    names = "model.safetensors", "pytorch_model.bin"
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _shape(state: Mapping[str, Tensor], settings: Mapping[str, Any], file: Path) -> tuple[VisionConfig, ImagePool]:
    what = "{} must hold the weights of a ViT by timm's names, missing {}"
    missing = [n for n in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight") if n not in state]
    require(OP, not missing, what, file, *missing[:1])
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    told, pictures = settings.get("model_args") or {}, settings.get("pretrained_cfg") or settings
    heads = told.get("num_heads") or _HEADS.get(width) or (width // 64 if width % 64 == 0 else None)
    what = "{} must lie beside a config.json of timm's that tells num_heads, got none for a width of {}"
    require(OP, heads is not None, what, file, width)
    assert heads is not None
    has_class, has_registers = "cls_token" in state, "reg_token" in state
    require(OP, not has_registers, "{} must hold a ViT without registers, got reg_token", file)
    side = round((state["pos_embed"].shape[1] - has_class) ** 0.5)
    norm_pre, layers = "norm_pre.weight" in state, {int(n.split(".")[1]) for n in state if n.startswith("blocks.")}
    mean, std = (tuple(pictures.get(name) or _INCEPTION) for name in ("mean", "std"))
    config = VisionConfig(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        num_layers=len(layers),
        num_heads=heads,
        mlp_dim=len(state["blocks.0.mlp.fc1.weight"]),
        activation=_activation(told, settings),
        norm_eps=1e-5 if norm_pre else 1e-6,
        has_norm_pre=norm_pre,
        has_patch_bias="patch_embed.proj.bias" in state,
        has_class_token=has_class,
        has_final_norm=True,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else None,
        image_mean=mean,
        image_std=std,
        fit="squash" if pictures.get("crop_mode") == "squash" else "crop",
        interpolation="bilinear" if pictures.get("interpolation") == "bilinear" else "bicubic",
    )
    pool: ImagePool = _POOLS.get(settings.get("global_pool") or "", "class" if has_class else "mean")
    return config, "fc_norm" if "fc_norm.weight" in state else pool


def _activation(told: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    quick = "quickgelu" in str(settings.get("architecture"))
    return str(told.get("act_layer") or ("quick_gelu" if quick else "gelu"))


def timm_settings(vision: VisionConfig, pool: ImagePool, classes: tuple[str, ...]) -> dict[str, Any]:
    """What timm's config.json holds of a classifier; a ValueError of a tower that its VisionTransformer cannot be."""
    held = {name: getattr(vision, name) for name in _HELD}
    held["antialias"] = vision.antialias  # of other sizes, which no file tells
    plain = VisionConfig(**held, norm_eps=1e-6, has_patch_bias=not vision.has_norm_pre, has_final_norm=True)
    for name in vars(plain):
        ours, theirs = getattr(vision, name), getattr(plain, name)
        require("save_timm", ours == theirs, "{} must be {!r} to be written for timm, got {!r}", name, theirs, ours)
    require("save_timm", vision.fit != "pad", "fit must be crop or squash to be written for timm, got {!r}", vision.fit)
    pools = {"class": "token", "mean": "avg", "fc_norm": "avg"}
    require("save_timm", pool in pools, "pool must be one of {} to be written for timm, got {!r}", list(pools), pool)
    arguments = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.width,
        "depth": vision.num_layers,
        "num_heads": vision.num_heads,
        "mlp_ratio": vision.mlp_dim / vision.width,
        "class_token": vision.has_class_token,
        "pre_norm": vision.has_norm_pre,
        "init_values": vision.layer_scale,
        "act_layer": vision.activation,
        "global_pool": pools[pool],
        "fc_norm": pool == "fc_norm",
        "weight_init": "skip",
    }
    pictures = {
        "input_size": [3, vision.image_size, vision.image_size],
        "mean": list(vision.image_mean),
        "std": list(vision.image_std),
        "interpolation": vision.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash" if vision.fit == "squash" else "center",
        "num_classes": len(classes),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    settings = {"num_classes": len(classes), "num_features": vision.width, "global_pool": pools[pool]}
    names = {"label_names": list(classes)}
    return {
        "architecture": "vit_base_patch16_224",
        **settings,
        **names,
        "model_args": arguments,
        "pretrained_cfg": pictures,
    }
