"""Token-contrastive statistics by tiles of plain ATen calls: what a CPU runs, and float64 on any device.

A tile is all tokens of some rows against some columns. Backward uses that of the Q products of a row with a
column only the best one counts: once the winner is known, both gradients are weighted sums of single features
(`embedding_bag`), 1/Q of the two matrix products that a dense dL/dS would take.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._gemm import factor, matmul_nt
from mmkernels._numerics import log_sum_exp, widen
from mmkernels._tile import fold_tile, grad_tile
from mmkernels.token_contrastive.problem import (
    Problem,
    TokenContrastiveStats,
    Weights,
    empty_positives,
    field_sizes,
    grad_total,
    mean_cosine,
    weights_of,
)

# Products of a tile, 4 MiB of float32: large enough for GEMM's full speed, small enough to stay in a last-level
# cache; and its columns, as many as fit beside at least one row.
TILE = 1 << 20
TILE_COLS = 1024
# 256 MiB, where a launch costs as much as a thousand products
CUDA_TILE = 1 << 26

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def token_contrastive_fwd(problem: Problem) -> TokenContrastiveStats:
    """The statistics of `S = scale * max_q <tokens_q, b>`, tile by tile."""
    problem = factors(problem)
    sums = Sums(problem)
    for of_rows, of_cols in tiles(problem):
        block = problem.block(of_rows, of_cols)
        _, cosines = best_tokens(block)
        fold_tile(cosines, float(problem.scale), *sums.of_rows(of_rows), *sums.of_cols(of_cols))
        logits = cosines.mul_(float(problem.scale))
        sums.add_rows(block, logits, of_rows)
        sums.add_cols(block, logits, of_rows, of_cols)
    return sums.stats()


def token_contrastive_bwd(
    problem: Problem, stats: TokenContrastiveStats, grads: Sequence[Tensor], needs: Sequence[bool]
) -> Gradients:
    """Gradients of `tokens`, `b` and `scale`, those that `needs` asks for; the tiles are recomputed."""
    problem, scale, dtype = factors(problem), float(problem.scale), accumulator(problem.b.dtype)
    weights, center = weights_of(stats, grads), mean_cosine(problem)
    needs_tokens, needs_b, needs_scale = needs
    dtokens = torch.zeros_like(problem.tokens, dtype=dtype) if needs_tokens else None
    db = torch.zeros_like(problem.b, dtype=dtype) if needs_b else None
    dscale = problem.b.new_zeros((), dtype=torch.float64)
    for of_rows, of_cols in tiles(problem):
        block, coefs = problem.block(of_rows, of_cols), weights.block(of_rows, of_cols)
        products, cosines = best_tokens(block)
        grad = torch.empty_like(cosines)
        row, col = (stats.row_lse[of_rows], coefs.row), (stats.col_lse[of_cols], coefs.col)
        grad_tile(cosines, scale, row, col, None, None, grad)
        add_row_weights(block, coefs, grad)
        add_col_weights(block, coefs, grad)
        if needs_scale:
            dscale += ((cosines - center) * grad).sum(1).sum(dtype=torch.float64)
        if block.tokens_mask is not None:
            grad.masked_fill_(~block.tokens_mask.any(1, keepdim=True), 0)
        if dtokens is not None or db is not None:
            index = places(first_best(products, cosines, 1), products.shape[1], 0)
            if dtokens is not None:
                scatter_sums(dtokens[of_rows].flatten(0, 1), index, grad, widen(block.b))
            if db is not None:
                gather_sums(db[of_cols], index.T, grad.T, widen(block.tokens.flatten(0, 1)))
    for dx in (dtokens, db):
        if dx is not None:
            dx.mul_(scale)
    return dtokens, db, dscale + center * grad_total(problem, grads) if needs_scale else None


class Sums:
    """The statistics of tiles seen so far."""

    def __init__(self, problem: Problem) -> None:
        (num_rows, num_cols), dtype = problem.shape, accumulator(problem.tokens.dtype)
        like = problem.tokens.new_empty(0, dtype=dtype)
        self.row_max, self.col_max = (like.new_full((size,), -torch.inf) for size in (num_rows, num_cols))
        self.row_sum, self.col_sum = like.new_zeros(num_rows), like.new_zeros(num_cols)
        empty = [like.new_zeros(size) for size in field_sizes(problem)]
        self.linear = TokenContrastiveStats(*empty)._replace(positive=empty_positives(problem))
        if problem.b.ndim == 3:
            self.linear = self.linear._replace(col_positive=empty_positives(problem))

    def of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.row_max[rows], self.row_sum[rows]

    def of_cols(self, cols: slice) -> tuple[Tensor, Tensor]:
        return self.col_max[cols], self.col_sum[cols]

    def add_rows(self, block: Problem, logits: Tensor, rows: slice) -> None:
        """Add what is linear in a tile of the rows' S `[r, c]`."""
        if block.positives is not None:
            _take_positives(logits, block.positives, self.linear.positive[rows])
        if block.with_totals:
            self.linear.row_total[rows] += logits.sum(1)
        if block.row_labels is not None:
            self.linear.row_matched[rows] += torch.where(_equal_labels(block), logits, 0).sum(1)

    def add_cols(self, block: Problem, logits: Tensor, rows: slice, cols: slice) -> None:
        """Add what is linear in a tile of the columns' S `[r, c]`; of late interaction the positives too."""
        if block.positives is not None and block.b.ndim == 3:
            _take_positives(logits, block.positives, self.linear.col_positive[rows])
        if block.with_totals:
            self.linear.col_total[cols] += logits.sum(0)
        if block.row_labels is not None:
            self.linear.col_matched[cols] += torch.where(_equal_labels(block), logits, 0).sum(0)

    def stats(self) -> TokenContrastiveStats:
        row_lse, row_rest = log_sum_exp(self.row_max, self.row_sum)
        col_lse, col_rest = log_sum_exp(self.col_max, self.col_sum)
        return self.linear._replace(row_lse=row_lse, col_lse=col_lse, row_rest=row_rest, col_rest=col_rest)


def factors(problem: Problem) -> Problem:
    return replace(problem, tokens=factor(problem.tokens), b=factor(problem.b))


def tiles(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile, a pure function of the problem's shape and device."""
    (num_rows, num_cols), num_tokens = problem.shape, problem.tokens.shape[1]
    per_col = problem.b.shape[1] if problem.b.ndim == 3 else 1
    size = CUDA_TILE if problem.tokens.is_cuda else TILE
    cols = max(min(num_cols, TILE_COLS // per_col, size // (num_tokens * per_col)), 1)
    rows = max(min(num_rows, size // (num_tokens * per_col * cols)), 1)
    for r in range(0, num_rows, rows):
        for c in range(0, num_cols, cols):
            yield slice(r, min(r + rows, num_rows)), slice(c, min(c + cols, num_cols))


def best_tokens(block: Problem) -> tuple[Tensor, Tensor]:
    """All products `[r, Q, c]`, and the largest of each row with each column `[r, c]`, zero for a masked row."""
    num_rows, num_tokens = block.tokens.shape[:2]
    products = matmul_nt(block.tokens.flatten(0, 1), block.b).view(num_rows, num_tokens, -1)
    if block.tokens_mask is None:
        return products, products.amax(1)
    products.masked_fill_(~block.tokens_mask[:, :, None], -torch.inf)
    return products, products.amax(1).masked_fill_(~block.tokens_mask.any(1, keepdim=True), 0)


def first_best(products: Tensor, best: Tensor, dim: int) -> Tensor:
    """int32, the shape of `best`: the lowest place along `dim` at which `products` equal it; the last where none
    do.

    By vectorised comparisons and a maximum over small integers: ATen's own search for an index is as slow as
    the matrix product.
    """
    size = products.shape[dim]
    dtype = torch.uint8 if size < 256 else torch.int32
    from_end = torch.arange(size, 0, -1, dtype=dtype, device=products.device)
    from_end = from_end.view(-1, *(1,) * (products.ndim - 1 - dim))
    hits = products == best.unsqueeze(dim)
    hits = hits.view(torch.uint8).mul_(from_end) if dtype == torch.uint8 else hits * from_end
    return (size - hits.amax(dim).int()).clamp_(max=size - 1)


def places(winner: Tensor, stride: int, dim: int) -> Tensor:
    """`winner` in place, plus `stride` times the index along `dim`: rows of the flattened tokens."""
    index = torch.arange(winner.shape[dim], dtype=torch.int32, device=winner.device)
    return winner.add_(index.view(-1, *(1,) * (winner.ndim - 1 - dim)), alpha=stride)


def gather_sums(out: Tensor, index: Tensor, weight: Tensor, features: Tensor) -> None:
    """`out_k += sum_l weight_kl features[index_kl]`, out `[K, D]`, index and weight `[K, L]`."""
    out += F.embedding_bag(index.contiguous(), features, mode="sum", per_sample_weights=weight.contiguous())


def scatter_sums(out: Tensor, index: Tensor, weight: Tensor, features: Tensor) -> None:
    """`out[index_kl] += weight_kl features_l`, out `[R, D]`, index int32 and weight `[K, L]`.

    By a stable sort, so that reruns are bit-identical.
    """
    ordered, order = index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(len(out) + 1, dtype=ordered.dtype, device=ordered.device))
    out += F.embedding_bag(
        order % len(features),
        features,
        ends,
        mode="sum",
        per_sample_weights=weight.reshape(-1)[order],
        include_last_offset=True,
    )


def _take_positives(logits: Tensor, place: Tensor, out: Tensor) -> None:
    """Write the logits at column `place[i]` of row i of the tile, where there is such a column."""
    inside, index = _inside(logits, place)
    torch.where(inside, logits.gather(1, index)[:, 0], out, out=out)


def _equal_labels(block: Problem) -> Tensor:
    """bool `[r, c]`."""
    assert block.row_labels is not None and block.col_labels is not None
    return block.row_labels[:, None] == block.col_labels


def add_row_weights(block: Problem, weights: Weights, grad: Tensor) -> None:
    """Add to a tile of dL/dS `[r, c]` what the linear statistics of its rows bring."""
    if block.positives is not None:
        _add_positives(grad, block.positives, weights.positive)
    if block.with_totals:
        grad += weights.row_total[:, None]
    if block.row_labels is not None:
        grad += torch.where(_equal_labels(block), weights.row_matched[:, None], 0)


def add_col_weights(block: Problem, weights: Weights, grad: Tensor) -> None:
    """Add to a tile of dL/dS `[r, c]` what the linear statistics of its columns bring."""
    if block.positives is not None and len(weights.col_positive):
        _add_positives(grad, block.positives, weights.col_positive)
    if block.with_totals:
        grad += weights.col_total
    if block.row_labels is not None:
        grad += torch.where(_equal_labels(block), weights.col_matched, 0)


def _add_positives(grad: Tensor, place: Tensor, weight: Tensor) -> None:
    inside, index = _inside(grad, place)
    grad.scatter_add_(1, index, torch.where(inside, weight, 0)[:, None])


def _inside(tile: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows have their place in the tile, and some column of each to look at `[r, 1]`."""
    last = tile.shape[1] - 1
    return (place >= 0) & (place <= last), place.clamp(0, last)[:, None]
