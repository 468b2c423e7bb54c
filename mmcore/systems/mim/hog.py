"""Histograms of oriented gradients as MaskFeat predicts them (arXiv:2112.09133)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.ops import require

_BINS = 9
VALUES_OF_CELL = 3 * _BINS
"""Of all colours."""


def hog(images: Tensor, patch: int, cell: int) -> Tensor:
    """Each patch's histograms of the directions of gradients, weighted by their lengths, one a cell and colour, of unit
    norm; a flat cell's is 0.

    Gradients are Sobel's, edges reflected; opposite directions fall into one of nine bins, whole.

    Args:
        images: [B, 3, S, S], floating point.
        patch: pixels of a patch, of which S is a multiple.
        cell: pixels of a cell, of which `patch` is a multiple.

    Returns:
        [B, P, 27 (patch / cell)^2], ordered by colour, bin, row and column of the cell; at least float32.
    """
    fits = images.ndim == 4 and images.shape[2] % patch == 0 and images.shape[3] % patch == 0 and patch % cell == 0
    what = "images must be of patches of {} pixels, of cells of {}, got {}"
    require("hog", fits, what, patch, cell, list(images.shape))
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    batch, colours, height, width = x.shape
    x = F.pad(x.reshape(-1, 1, height, width), (1, 1, 1, 1), mode="reflect")
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=x.dtype, device=x.device)
    across, down = F.conv2d(x, torch.stack([sobel, sobel.T])[:, None]).unbind(1)  # [B 3, S, S]
    bins = (torch.atan2(across, down) / math.pi * _BINS).floor().long() % _BINS
    lengths = (across.square() + down.square()).sqrt()
    maps = torch.zeros(len(x), _BINS, height, width, dtype=x.dtype, device=x.device)
    maps.scatter_(1, bins[:, None], lengths[:, None])
    cells = F.avg_pool2d(maps, cell) * cell**2
    cells = F.normalize(cells, dim=1).unflatten(0, (batch, colours)).flatten(1, 2)  # [B, 27, rows, columns]
    size = patch // cell
    patches = cells.unfold(2, size, size).unfold(3, size, size)  # [B, 27, rows, columns, size, size]
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
