"""Shapes of masked image modelling as published, and a small one of each for a first run on digits of 16 pixels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmcore.systems.mim.model import MaskConfig, MimConfig
from mmcore.systems.mim.vqkd import VqKdConfig
from mmcore.systems.vit.shapes import SIZES, vit_vision

_BEIT = {"positions": "none", "qkv_bias": "q and v", "relative_positions": "shared", "has_mask_token": True}
_TINY = {"qkv_bias": "q and v", "has_mask_token": True}
_SMALL = MaskConfig("blocks", 0.4, min_block=2)


def _tower(name: str, size: int | None = None, **options: Any) -> Any:
    sizes = SIZES[name] if size is None else (size, *SIZES[name][1:])
    return vit_vision(*sizes, **options)


_WIDE = 0.1
"""Deviation of the small towers' weights: the published 0.02 is of towers at least twelve times as wide."""


def _tiny(outputs: int, mask: MaskConfig, **options: Any) -> MimConfig:
    """BEiT's tower with learned positions besides, which its code has as an option, and without the layer scale: for
    hundreds of steps."""
    vision = replace(_tower("tiny", **_BEIT), positions="learned")
    return MimConfig(vision, outputs, mask, init_std=_WIDE, **options)


def _cells(pixels: int, patch: int) -> MaskConfig:
    return MaskConfig("cells", 0.6, cell=pixels // patch)


# of BEiT 75 of 196 patches, of EVA 105 of 256, of data2vec 120 of 196
_BLOCKS = MaskConfig("blocks", 75.5 / 196)
_beit = {**_BEIT, "layer_scale": 0.1, "drop_path": 0.1}
SIMMIM: Mapping[str, MimConfig] = {
    "tiny": _tiny(48, _cells(4, 4)),
    "tiny-absolute": MimConfig(_tower("tiny", has_mask_token=True), 48, _cells(4, 4), init_std=_WIDE),
    "ViT-B-16": MimConfig(_tower("ViT-B-16", 192, **_beit), 768, _cells(32, 16)),
}
_MASKFEAT = {"layer_scale": None, "has_mask_token": True}
MASKFEAT: Mapping[str, MimConfig] = {
    # a cell a patch: histograms of 4 pixels are noise
    "tiny": MimConfig(_tower("tiny", has_mask_token=True), 27, _SMALL, init_std=_WIDE),
    "ViT-B-16": MimConfig(_tower("ViT-B-16", **_MASKFEAT), 108, MaskConfig("blocks", 0.4)),
    "ViT-L-16": MimConfig(_tower("ViT-L-16", **_MASKFEAT), 108, MaskConfig("blocks", 0.4)),
}
_large = {**_beit, "layer_scale": 1e-5}
BEIT: Mapping[str, MimConfig] = {
    "tiny": _tiny(32, _SMALL),
    "ViT-B-16": MimConfig(_tower("ViT-B-16", **_beit), 8192, _BLOCKS),
    "ViT-L-16": MimConfig(_tower("ViT-L-16", **_large), 8192, _BLOCKS),
}
BEIT2: Mapping[str, MimConfig] = {
    "tiny": _tiny(32, _SMALL, class_layers=1, class_from=2),
    "ViT-B-16": replace(BEIT["ViT-B-16"], class_layers=2, class_from=9),
    "ViT-L-16": replace(BEIT["ViT-L-16"], class_layers=2, class_from=21),
}
MVP: Mapping[str, MimConfig] = {
    "tiny": _tiny(64, _SMALL),
    "ViT-B-16": MimConfig(_tower("ViT-B-16", **_beit), 512, _BLOCKS),
    "ViT-L-16": MimConfig(_tower("ViT-L-16", **_large), 512, _BLOCKS),
}
_EVA = {"qkv_bias": "q and v", "has_mask_token": True, "drop_path": 0.1}
_eva_g = vit_vision(224, 14, 1408, 40, 16, 6144, **_EVA)
EVA: Mapping[str, MimConfig] = {
    "tiny": MimConfig(_tower("tiny", **_TINY), 64, _SMALL, init_std=_WIDE),
    "ViT-B-14": MimConfig(vit_vision(224, 14, 768, 12, 12, 3072, **_EVA), 768, MaskConfig("blocks", 105.5 / 256)),
    "ViT-g-14": MimConfig(_eva_g, 768, MaskConfig("blocks", 105.5 / 256), init_std=0.015),
}
_data2vec = {**_BEIT, "layer_scale": 1e-4, "drop_path": 0.2}
DATA2VEC: Mapping[str, MimConfig] = {
    "tiny": _tiny(64, MaskConfig("blocks", 0.6, min_block=2), average_top=2),
    "ViT-B-16": MimConfig(_tower("ViT-B-16", **_data2vec), 768, MaskConfig("blocks", 120.5 / 196), average_top=6),
    "ViT-L-16": MimConfig(_tower("ViT-L-16", **_data2vec), 1024, MaskConfig("blocks", 120.5 / 196), average_top=18),
}
_VQKD = {"qkv_bias": "q and v", "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
VQKD: Mapping[str, VqKdConfig] = {
    "tiny": VqKdConfig(replace(_tower("tiny"), **_VQKD), 32, 8),
    "ViT-B-16": VqKdConfig(replace(_tower("ViT-B-16"), **_VQKD)),
    "ViT-B-16-3": VqKdConfig(replace(_tower("ViT-B-16"), **_VQKD), decoder_layers=3),
}
