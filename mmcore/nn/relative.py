"""Biases of attention by the distance of two patches, as BEiT has them (arXiv:2106.08254)."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.ops import require

_OTHERS = 3
"""Rows of a table behind those of distances: class token to all, all to class token, class token to itself."""


@lru_cache(maxsize=16)
def relative_places(side: int) -> np.ndarray:
    """Which row of a table each pair of tokens takes, int64 [T, T], T = 1 + side^2, the class token first: rows are
    ordered by the distance of rows of patches, then of columns, query less key."""
    rows, columns = (x.reshape(-1) for x in np.indices((side, side)))
    width = 2 * side - 1
    down, right = (x[:, None] - x[None, :] + side - 1 for x in (rows, columns))
    places = np.empty((1 + side**2, 1 + side**2), dtype=np.int64)
    places[1:, 1:] = down * width + right
    places[0, :], places[:, 0], places[0, 0] = width**2, width**2 + 1, width**2 + 2
    return places


class RelativePositions(nn.Module):
    """A learned bias for each distance of two patches of a square grid, and for the class token, a head each.

    Args:
        side: patches of a side of the grid.
        num_heads: H.

    Attributes:
        table: [(2 * side - 1)^2 + 3, H], zeros at first.
    """

    def __init__(self, side: int, num_heads: int) -> None:
        super().__init__()
        require("RelativePositions", side >= 1, "side must be at least 1, got {}", side)
        self.side = side
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + _OTHERS, num_heads))

    def forward(self, side: int | None = None) -> Tensor:
        """What is added to the logits of a class token and `side`^2 patches: [1, H, T, T]. Of another grid than the
        own, the table of distances is interpolated, bilinearly as transformers does. For `mmkernels.masks.Dense`; a
        tensor, since ZeRO-3 gathers the table again for the gradient of such alone."""
        side = self.side if side is None else side
        table = self.table
        if side != self.side:
            width, wanted = 2 * self.side - 1, 2 * side - 1
            grid = table[:-_OTHERS].T.reshape(1, -1, width, width)  # [1, H, distances, distances]
            grid = F.interpolate(grid, size=(wanted, wanted), mode="bilinear")
            table = torch.cat([grid.flatten(2)[0].T, table[-_OTHERS:]])
        return table[torch.from_numpy(relative_places(side)).to(table.device)].permute(2, 0, 1)[None]
