"""Projection heads of self-supervision, with BatchNorm over the batches of all ranks."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch.distributed as dist
from torch import nn

from mmcore.nn import BatchNorm, Linear
from mmcore.ops import require


def projection_head(
    sizes: Sequence[int],
    *,
    normalised: bool = True,
    ends_normalised: bool = False,
    ends_affine: bool = True,
    bias: bool = True,
) -> nn.Sequential:
    """`layer1`, `bn1`, `relu1`, ..., of widths `sizes`, two or more. The names are SLIP's; MoCo v3, SimSiam, BYOL and
    DeCLIP have the same layers.

    Args:
        sizes: the input's width, then that of each layer.
        normalised: whether a BatchNorm is behind each layer but the last (MoCo's head has none).
        ends_normalised: whether one is behind the last layer.
        ends_affine: whether that one has a weight and a bias.
        bias: whether layers that a BatchNorm follows have a bias, which it takes out again.
    """
    fits = len(sizes) >= 2 and min(sizes) >= 1
    require("projection_head", fits, "sizes must be two or more widths, got {}", list(sizes))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width, following) in enumerate(pairwise(sizes), 1):
        is_last = i == len(sizes) - 1
        has_norm = ends_normalised if is_last else normalised
        layers[f"layer{i}"] = Linear(width, following, bias=bias or not has_norm)
        if has_norm:
            layers[f"bn{i}"] = BatchNorm(following, affine=ends_affine or not is_last)
        if not is_last:
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)


def check_batch(op: str, batch_size: int) -> None:
    """Raises a ValueError where a BatchNorm over all ranks would have one row alone."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    require(op, batch_size * ranks >= 2, "--batch-size must be at least 2, which BatchNorm needs, got {}", batch_size)
