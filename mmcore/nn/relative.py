"""Biases of attention by the distance of two patches, as BEiT has them (arXiv:2106.08254), and of two words besides, as
VLMo has them (arXiv:2111.02358)."""

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
        places = torch.from_numpy(relative_places(side)).to(table.device)
        return F.embedding(places, table).permute(2, 0, 1)[None]


@lru_cache(maxsize=16)
def multiway_places(side: int, max_text: int, num_text: int, has_image: bool) -> np.ndarray:
    """Which row of a table each pair of tokens takes, int64 [T, T]: `num_text` words, the first of which is a class
    token, then where there is an image its class token and patches. Rows are those of `relative_places`, then of a word
    and a patch, of a patch and a word, of the distances of two words, key less query, and of the words' class token."""
    first = (2 * side - 1) ** 2 + _OTHERS  # of what words have
    words = np.empty((num_text, num_text), dtype=np.int64)
    inner = np.arange(max(0, num_text - 1))
    words[1:, 1:] = inner[None, :] - inner[:, None] + max_text - 2 + first + 2
    last = first + 2 * max_text - 1
    if num_text:
        words[0, :], words[:, 0], words[0, 0] = last, last + 1, last + 2
    if not has_image:
        return words
    patches = relative_places(side)
    beside = np.full((num_text, len(patches)), first), np.full((len(patches), num_text), first + 1)
    return np.block([[words, beside[0]], [beside[1], patches]])


class MultiwayPositions(nn.Module):
    """A learned bias for each distance of two patches or of two words, a layer and a head each, in one table.

    Args:
        side: patches of a side of the grid.
        max_text: the longest text whose distances have rows, at least 2.
        num_layers: L.
        num_heads: H.

    Attributes:
        table: [(2 * side - 1)^2 + 3 + 2 * max_text + 2, L * H], zeros at first.
    """

    def __init__(self, side: int, max_text: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        op = "MultiwayPositions"
        require(op, side >= 1, "side must be at least 1, got {}", side)
        require(op, max_text >= 2, "max_text must be at least 2, got {}", max_text)
        self.side, self.max_text, self.num_layers = side, max_text, num_layers
        num_rows = (2 * side - 1) ** 2 + _OTHERS + 2 * max_text + 2
        self.table = nn.Parameter(torch.zeros(num_rows, num_layers * num_heads))

    def forward(self, num_text: int, has_image: bool) -> Tensor:
        """What is added to the logits of so many words, and of an image behind them: [L, H, T, T]; a tensor, see
        `RelativePositions`."""
        fits = 0 <= num_text <= self.max_text and (has_image or num_text > 0)
        require("MultiwayPositions", fits, "num_text must be at most {}, got {}", self.max_text, num_text)
        places = torch.from_numpy(multiway_places(self.side, self.max_text, num_text, has_image))
        found = F.embedding(places.to(self.table.device), self.table)  # [T, T, L H]
        return found.permute(2, 0, 1).unflatten(0, (self.num_layers, -1))


def resized_distances(table: Tensor, old: int, new: int) -> Tensor:
    """A table of distances of patches for another grid, by cubic splines: old distances lie apart geometrically, so
    that the farthest of both meet (as BEiT and VLMo are fine-tuned on images of another size).

    Args:
        table: [(2 * old - 1)^2 + N, C]; the last N rows, of what are no distances of patches, stay.
        old, new: patches of a side of the grids.

    Returns:
        [(2 * new - 1)^2 + N, C] in the dtype of `table`, computed in float64.
    """
    if old == new:
        return table
    width = 2 * old - 1
    grid = table[: width**2].double().view(width, width, -1)
    ratio, low, high = 1.01, 1.01, 1.5
    while high - low > 1e-6:  # of each step between two distances to the one before it
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1 else (ratio, high)
    steps = ratio ** torch.arange(old - 1, dtype=torch.float64)
    far = steps.cumsum(0)
    at = torch.cat([-far.flip(0), far.new_zeros(1), far])
    weights = _spline(at, torch.arange(1 - new, new, dtype=torch.float64))
    found = torch.einsum("ai,bj,ijc->abc", weights, weights, grid).flatten(0, 1)
    return torch.cat([found.to(table.dtype), table[width**2 :]])


def _spline(at: Tensor, wanted: Tensor) -> Tensor:
    """Weights [M, N] of values at `at` [N], rising, in those at `wanted` [M] of the cubic spline through them, whose
    third derivative is continuous next to the ends too; beyond them a place has the end's. Of N below 4 the polynomial
    through all."""
    wanted, num = wanted.clamp(at[0], at[-1]), len(at)
    if num < 4:
        others = [[j for j in range(num) if j != i] for i in range(num)]
        parts = [torch.stack([(wanted - at[j]) / (at[i] - at[j]) for j in js]) for i, js in enumerate(others) if js]
        return torch.stack([x.prod(0) for x in parts], 1) if parts else wanted.new_ones(len(wanted), 1)
    step = at.diff()
    system, right = at.new_zeros(num, num), at.new_zeros(num, num)  # of second derivatives, of values
    for i in range(1, num - 1):
        system[i, i - 1 : i + 2] = torch.stack([step[i - 1], 2 * (step[i - 1] + step[i]), step[i]])
        right[i, i - 1], right[i, i + 1] = 6 / step[i - 1], 6 / step[i]
        right[i, i] = -right[i, i - 1] - right[i, i + 1]
    for row, i in ((0, 1), (num - 1, num - 2)):
        system[row, i - 1 : i + 2] = torch.stack([-1 / step[i - 1], 1 / step[i - 1] + 1 / step[i], -1 / step[i]])
    second = torch.linalg.solve(system, right)
    i = (torch.searchsorted(at, wanted, right=True) - 1).clamp(0, num - 2)
    a, b, h = (at[i + 1] - wanted)[:, None], (wanted - at[i])[:, None], step[i][:, None]
    values = torch.eye(num, dtype=at.dtype)
    cubic = (a**3 - a * h**2) * second[i] + (b**3 - b * h**2) * second[i + 1]
    return (a * values[i] + b * values[i + 1]) / h + cubic / (6 * h)
