"""Masks over the patches of an image, drawn on the host by the random numbers of a sample, and how they are applied."""

import math

import numpy as np
import torch
from torch import Tensor

from mmcore.ops import require

_MAX_TRIES = 10


def num_kept(num: int, ratio: float) -> int:
    """How many of `num` patches `random_mask` keeps: int(num * (1 - ratio)), in floating point as it is published."""
    return int(num * (1 - ratio)) if 0 <= ratio <= 1 else 0


def random_mask(num: int, ratio: float, rng: np.random.Generator) -> Tensor:
    """Which of `num` patches stay visible, drawn uniformly (MAE, arXiv 2111.06377): int64 [K], rising, K of `num_kept`;
    a ValueError of a ratio that masks nothing, or leaves nothing."""
    kept = num_kept(num, ratio)
    require("random_mask", 0 < kept < num, "ratio must mask and leave at least one of {} patches, got {}", num, ratio)
    return torch.from_numpy(np.sort(rng.permutation(num)[:kept]))


def block_mask(
    grid: tuple[int, int], count: int, min_block: int, aspect: float, rng: np.random.Generator
) -> np.ndarray:
    """Rectangles of masked patches, until `count` are or none is found that fits in ten tries (BEiT, arXiv 2106.08254;
    iBOT, arXiv 2111.07832): bool `grid` [rows, columns], True for 1 to `count` of them.

    Unlike theirs a rectangle may be as high or as wide as the grid, and the first is cut to `count`, so that it exists.
    A ValueError of a mask of nothing or of all, and of rectangles that cannot be.

    Args:
        min_block: patches of the smallest rectangle, rounding aside; the last may be smaller.
        aspect: heights are `aspect` to `1 / aspect` of widths, drawn evenly in the logarithm.
    """
    op, num = "block_mask", grid[0] * grid[1]
    require(op, 0 < count < num, "count must mask and leave at least one of {} patches, got {}", num, count)
    require(op, 0 < min_block <= count, "min_block must be from 1 to count {}, got {}", count, min_block)
    require(op, 0 < aspect <= 1, "aspect must be above 0 and at most 1, got {}", aspect)
    mask, tries = np.zeros(grid, dtype=bool), 0
    while (left := count - int(mask.sum())) and tries < _MAX_TRIES:
        tries += 1
        area = rng.uniform(*sorted((min_block, left)))
        shape = math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
        height, width = max(1, round(math.sqrt(area * shape))), max(1, round(math.sqrt(area / shape)))
        if left == count:
            height = min(height, grid[0], count)
            width = min(width, grid[1], count // height)
        if height > grid[0] or width > grid[1]:
            continue
        top, start = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
        block = mask[top : top + height, start : start + width]  # a view
        if 0 < block.size - int(block.sum()) <= left:
            block[:], tries = True, 0
    return mask


def coarse_mask(grid: tuple[int, int], block: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Cells of `block` by `block` patches, of which ceil(ratio * cells) are masked (SimMIM, arXiv 2111.09886): bool
    `grid` [rows, columns]; a ValueError of a mask of nothing or of all, and of cells that do not fill the grid."""
    op, fits = "coarse_mask", block >= 1 and grid[0] % block == 0 and grid[1] % block == 0
    require(op, fits, "block must divide the grid of {} x {} patches, got {}", *grid, block)
    cells = grid[0] // block, grid[1] // block
    num = cells[0] * cells[1]
    masked = math.ceil(ratio * num) if 0 <= ratio <= 1 else 0
    require(op, 0 < masked < num, "ratio must mask and leave at least one of {} cells, got {}", num, ratio)
    mask = np.zeros(num, dtype=bool)
    mask[rng.permutation(num)[:masked]] = True
    return mask.reshape(cells).repeat(block, 0).repeat(block, 1)


def gather(x: Tensor, kept: Tensor) -> Tensor:
    """The rows [B, K, D] of [B, P, D] that `kept` [B, K] names."""
    return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))


def restore(x: Tensor, kept: Tensor, filler: Tensor, num: int) -> Tensor:
    """[B, num, D]: the rows of `x` [B, K, D] at places `kept` [B, K], and elsewhere `filler`, [D] or [B, num, D]."""
    full = filler.to(x.dtype).expand(len(x), num, x.shape[2])
    return full.scatter(1, kept[:, :, None].expand(-1, -1, x.shape[2]), x)


def hidden(kept: Tensor, num: int) -> Tensor:
    """bool [B, num]: the patches that `kept`, int64 [B, K], does not name; of bool, that itself."""
    if kept.dtype == torch.bool:
        return kept
    return torch.ones(len(kept), num, dtype=torch.bool, device=kept.device).scatter(1, kept, False)
