"""Position embeddings of a grid of patches: fixed ones, and learned ones carried over to another grid."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(width: int, num_patches: int, *, num_prefix: int = 1) -> Tensor:
    """Sines and cosines of a patch's column, then of its row, at the frequencies `10000^(-4 i / D)`.

    Args:
        width: D, a multiple of 4.
        num_patches: P, a square number.
        num_prefix: rows of zeros for tokens that belong to no patch, >= 0.

    Returns:
        [num_prefix + P, D] of torch's default dtype, computed in float64; patches row by row.

    Reference: MAE's official implementation (arXiv 2111.06377).
    """
    side = math.isqrt(max(num_patches, 0))
    if width < 4 or width % 4:
        raise ValueError(f"sincos_positions: width must be a multiple of 4, got {width}")
    if num_patches < 1 or side**2 != num_patches:
        raise ValueError(f"sincos_positions: num_patches must be a square number, got {num_patches}")
    places = torch.arange(side, dtype=torch.float64)
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = places[:, None] * frequencies  # [side, D / 4]
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side, D / 2]
    grid = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1)  # [P, D]
    return F.pad(grid, (0, 0, num_prefix, 0)).to(torch.get_default_dtype())


def interpolate_positions(
    positions: Tensor, num_patches: int, *, num_prefix: int = 1, antialias: bool = True
) -> Tensor:
    """Resample learned position embeddings of a square grid to another square grid (bicubic).

    Args:
        positions: [num_prefix + P, D], any float dtype; the prefix rows (class token) are copied.
        num_patches: P of the new grid, a square number.
        num_prefix: rows that belong to no patch, >= 0.
        antialias: whether a smaller grid averages over more than its nearest places, as CLIP's fine-tunings do; DINO
            and DINOv2 do not.

    Returns:
        [num_prefix + num_patches, D] in the dtype of `positions`, computed in float32; `positions` itself
        if the grid is the same.

    Reference: ViT, section 3.2 (arXiv 2010.11929).
    """
    old = positions.shape[0] - num_prefix
    if old == num_patches:
        return positions
    old_side, new_side = math.isqrt(max(old, 0)), math.isqrt(max(num_patches, 0))
    if old < 1 or old_side**2 != old:
        raise ValueError(f"interpolate_positions: positions must hold a square grid of patches, got {old}")
    if num_patches < 1 or new_side**2 != num_patches:
        raise ValueError(f"interpolate_positions: num_patches must be a square number, got {num_patches}")
    grid = positions[num_prefix:].float().reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", antialias=antialias, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(num_patches, -1)  # [P, D]
    return torch.cat([positions[:num_prefix], grid.to(positions.dtype)])


def resized_positions(positions: Tensor, grids: Sequence[tuple[int, int]], *, align_corners: bool = False) -> Tensor:
    """Learned position embeddings of a square grid at those of images of any shape (bilinear, antialiased), one image
    after the other.

    Args:
        positions: [P, D] of a square grid, any float dtype.
        grids: rows and columns of patches of each image, each at least 1.
        align_corners: the places at the corners keep theirs, without antialiasing, as ViLT has it.

    Returns:
        [N, D] in the dtype of `positions`, computed in float32, at aligned corners or wider; each distinct grid once.

    Reference: SigLIP 2's NaFlex (arXiv 2502.14786); ViLT (arXiv 2102.03334).
    """
    op, side = "resized_positions", math.isqrt(len(positions))
    if side < 1 or side**2 != len(positions):
        raise ValueError(f"{op}: positions must hold a square grid of patches, got {len(positions)}")
    if not all(min(grid) >= 1 for grid in grids):
        raise ValueError(f"{op}: grids must be of at least one row and column, got {list(grids)}")
    # [1, D, side, side]; with the channels last torch 2.13 interpolates to a single column wrongly
    # SigLIP 2's in float32 whatever it is given, as there
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32)) if align_corners else positions.float()
    square = wide.T.contiguous().view(1, -1, side, side)
    options = {"mode": "bilinear", "antialias": not align_corners, "align_corners": align_corners}
    found = {grid: F.interpolate(square, size=grid, **options)[0].flatten(1).T for grid in set(grids)}  # each [h w, D]
    return torch.cat([found[grid] for grid in grids]).to(positions.dtype) if grids else positions[:0]
