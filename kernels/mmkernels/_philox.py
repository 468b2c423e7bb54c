"""Philox-4x32-10 (Salmon et al., SC 2011): random bits as a function of a seed and a place, on any device.

The Triton kernels draw the same bits by `tl.philox`. Of attention's dropout: for query i, key j and head h of batch b,
word `j % 4` of the counter `(j // 4, i, b * H + h, 0)`. Of stochastic rounding: for element e of tensor n, word `e % 4`
of the counter `(e // 4, n, 0, 0)`.
"""

import torch
from torch import Tensor

from mmkernels import native

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def kept(seed: Tensor, dropout_p: float, heads: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Which weights dropout keeps, bool `[..., r, c]`.

    Args:
        seed: int64 `[]`.
        dropout_p: the share that is dropped.
        heads: int64 `[...]`, `b * H + h`.
        rows, cols: int64 `[r]`, `[c]`, indices of queries and keys; the keys in a row, each one more than the
            one before.
    """
    first = int(cols[0]) // 4 if len(cols) else 0
    last = int(cols[-1]) // 4 if len(cols) else -1
    quads = torch.arange(first, last + 1, device=cols.device)
    words = _philox(seed, quads, rows[:, None], heads[..., None, None])
    bits = torch.stack(words, -1).flatten(-2)  # [..., r, 4 quads]
    start = int(cols[0]) - 4 * first if len(cols) else 0
    return bits[..., start : start + len(cols)] >= threshold(dropout_p)


def drop_(weights: Tensor, seed: Tensor, dropout_p: float, heads: Tensor, rows: slice, cols: slice) -> Tensor:
    """`weights / (1 - dropout_p)` where `kept`, zero elsewhere, in place.

    Args:
        weights: `[b, H, r, c]`, contiguous.
        heads: int64 `[b, H]`.
        rows, cols: the queries and the keys.
    """
    scale = 1 / (1 - dropout_p)
    if native.AVAILABLE and weights.is_cpu and weights.dtype == torch.float32:
        tiles, limit = weights.flatten(0, 1), float(threshold(dropout_p))
        torch.ops.mmkernels.dropout_tile(tiles, heads.flatten(), rows.start, cols.start, seed, limit, scale)
        return weights
    places = (torch.arange(s.start, s.stop, device=weights.device) for s in (rows, cols))
    return weights.mul_(scale).masked_fill_(~kept(seed, dropout_p, heads, *places), 0)


def threshold(dropout_p: float) -> int:
    """The number of 32 bits from which a weight is kept."""
    return min(round(dropout_p * 2**32), MASK)


def element_bits(seed: Tensor, number: int, first: int, count: int) -> Tensor:
    """32 random bits, int64 `[count]`, for the elements from `first`, a multiple of 4, of tensor `number`."""
    quads = torch.arange(first // 4, -(-(first + count) // 4), device=seed.device)
    words = _philox(seed, quads, torch.full_like(quads, number), torch.zeros_like(quads))
    return torch.stack(words, -1).flatten()[:count]


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    key0, key1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + WEYL[0]) & MASK, (key1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product of numbers of 32 bits, which int64 would overflow."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
