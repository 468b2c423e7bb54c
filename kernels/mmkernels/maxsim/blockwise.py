"""MaxSim by tiles of plain ATen calls: what a CPU runs, and float64 on any device.

A tile is all queries against some documents. Backward reads a product's place, not the product: both gradients are
weighted sums of single tokens (`embedding_bag`).
"""

import torch
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._gemm import factor, matmul_nt
from mmkernels._numerics import widen
from mmkernels.token_contrastive.blockwise import first_best, gather_sums, scatter_sums

# Products of a tile, 4 MiB of float32; on a GPU 256 MiB.
TILE, CUDA_TILE = 1 << 20, 1 << 26


def _tiles(num_queries: int, d: Tensor) -> list[slice]:
    """Documents of each tile."""
    size = CUDA_TILE if d.is_cuda else TILE
    step = max(size // max(num_queries * d.shape[1], 1), 1)
    return [slice(n, min(n + step, len(d))) for n in range(0, len(d), step)]


def maxsim_fwd(q: Tensor, d: Tensor, d_mask: Tensor | None, with_best: bool) -> tuple[Tensor, Tensor | None]:
    """Of every document the largest product with each token of the queries `q [M, D]`, `[N, M]`, -inf where none
    counts, and if asked for the place of the first such, -1 where none counts."""
    q, length = factor(q), d.shape[1]
    found = q.new_empty(len(d), len(q), dtype=accumulator(q.dtype))
    best = d.new_empty(len(d), len(q), dtype=place_dtype(length)) if with_best else None
    for of in _tiles(len(q), d):
        products = matmul_nt(q, factor(d[of]).flatten(0, 1)).view(len(q), of.stop - of.start, length)
        if d_mask is not None:
            products.masked_fill_(~d_mask[of], -torch.inf)
        largest = products.amax(2)
        found[of] = largest.T
        if best is not None:
            places = first_best(products, largest, 2).T
            best[of] = places.masked_fill(largest.T.isneginf(), -1)
    return found, best


def maxsim_bwd(
    q: Tensor, d: Tensor, best: Tensor, grad: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `q [M, D]` and `d`, those that `needs` asks for, of dL/dS `[N, B]`."""
    num_each = len(q) // max(grad.shape[1], 1)
    dq, dd = (grad.new_zeros(x.shape) if needed else None for x, needed in zip((q, d), needs, strict=True))
    wide_q = widen(q)
    for of in _tiles(len(q), d):
        places = best[of].int()
        weight = grad[of].repeat_interleave(num_each, 1).masked_fill_(places < 0, 0)
        first = torch.arange(len(places), dtype=torch.int32, device=d.device) * d.shape[1]
        index = places.clamp(min=0) + first[:, None]  # [n, M] of the tile's tokens
        if dq is not None:
            # where none counts a row of zeros, behind the last: a token that does not may hold anything
            wide_d = torch.cat([widen(d[of]).flatten(0, 1), grad.new_zeros(1, d.shape[2])])
            gather_sums(dq, torch.where(places < 0, len(wide_d) - 1, index).T, weight.T, wide_d)
        if dd is not None:
            scatter_sums(dd[of].view(-1, d.shape[2]), index, weight, wide_q)
    return dq, dd


def place_dtype(length: int) -> torch.dtype:
    """That of a token's place in a document."""
    return torch.int16 if length < 1 << 15 else torch.int32
