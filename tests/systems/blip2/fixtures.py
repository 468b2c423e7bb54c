"""A BLIP-2 that a second stage starts from."""

from dataclasses import replace
from pathlib import Path

import torch

from mmcore.systems.blip2.model import BLIP2
from mmcore.systems.blip2.shapes import blip2_config
from mmcore.systems.blip2.weights import save_blip2


def write_start(folder: Path) -> Path:
    """Of random weights, its tower EVA's."""
    torch.manual_seed(0)
    shape = blip2_config("tiny")
    vision = replace(shape.vision, has_norm_pre=False, has_patch_bias=True, norm_eps=1e-6)
    save_blip2(BLIP2(replace(shape, vision=vision)), folder)
    return folder
