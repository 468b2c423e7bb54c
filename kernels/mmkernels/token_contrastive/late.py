"""Late interaction, FILIP's (arXiv:2111.07783): each token of one side against its best of the other, and the mean.

`S_row = scale * mean_q max_t <tokens_q, b_t>` for the rows' softmax and `S_col = scale * mean_t max_q` for the
columns'. By tiles of library calls on every device: the S of a tile are 1 / (Q T) of its products, so there is
little beside the products and two maxima that a kernel could save. Nothing waits for a GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._gemm import matmul_nt
from mmkernels._numerics import widen
from mmkernels._tile import fold_tile, grad_tile
from mmkernels.token_contrastive.blockwise import (
    Gradients,
    Sums,
    add_col_weights,
    add_row_weights,
    factors,
    first_best,
    gather_sums,
    places,
    scatter_sums,
    tiles,
)
from mmkernels.token_contrastive.problem import Problem, TokenContrastiveStats, grad_total, mean_cosine, weights_of


class _Tile(NamedTuple):
    """A tile's products `[r, Q, c, T]`, -inf where masked, their maxima, 0 where masked, and the means of those.

    The shares are what a token counts for in its mean, `[r, Q]` and `[c, T]`; 0 where masked, and where all of
    the other side is.
    """

    products: Tensor
    of_tokens: Tensor  # [r, Q, c] max over t
    of_texts: Tensor  # [r, c, T] max over q
    row_cosines: Tensor  # [r, c]
    col_cosines: Tensor  # [r, c]
    token_share: Tensor  # [r, Q, c] or broadcast to it
    text_share: Tensor  # [r, c, T] or broadcast to it


def token_contrastive_fwd(problem: Problem) -> TokenContrastiveStats:
    """The statistics of S_row along rows and of S_col along columns, tile by tile."""
    problem, scale = _on_device(problem), problem.scale.reshape(())
    sums = Sums(problem)
    for of_rows, of_cols in tiles(problem):
        block = problem.block(of_rows, of_cols)
        tile = _tile(block)
        row_logits, col_logits = tile.row_cosines * scale, tile.col_cosines * scale
        fold_tile(row_logits, 1.0, *sums.of_rows(of_rows))
        fold_tile(col_logits.T.contiguous(), 1.0, *sums.of_cols(of_cols))
        sums.add_rows(block, row_logits, of_rows)
        sums.add_cols(block, col_logits, of_rows, of_cols)
    return sums.stats()


def token_contrastive_bwd(
    problem: Problem, stats: TokenContrastiveStats, grads: Sequence[Tensor], needs: Sequence[bool]
) -> Gradients:
    """Gradients of `tokens`, `b` and `scale`, those that `needs` asks for; the tiles are recomputed."""
    problem, scale = _on_device(problem), problem.scale.reshape(())
    weights, center = weights_of(stats, grads), mean_cosine(problem)
    needs_tokens, needs_b, needs_scale = needs
    dtokens, db = (
        torch.zeros_like(x, dtype=center.dtype) if needed else None
        for x, needed in ((problem.tokens, needs_tokens), (problem.b, needs_b))
    )
    dscale = center.new_zeros((), dtype=torch.float64)
    for of_rows, of_cols in tiles(problem):
        block, coefs = problem.block(of_rows, of_cols), weights.block(of_rows, of_cols)
        tile = _tile(block)
        row, col = (stats.row_lse[of_rows], coefs.row), (stats.col_lse[of_cols], coefs.col)
        row_grad = _exponentials(tile.row_cosines * scale, row)
        col_grad = _exponentials((tile.col_cosines * scale).T.contiguous(), col).T.contiguous()
        add_row_weights(block, coefs, row_grad)
        add_col_weights(block, coefs, col_grad)
        if needs_scale:
            share = (tile.row_cosines - center) * row_grad + (tile.col_cosines - center) * col_grad
            dscale += share.sum(1).sum(dtype=torch.float64)
        part_of_tokens = None if dtokens is None else dtokens[of_rows].flatten(0, 1)
        part_of_b = None if db is None else db[of_cols].flatten(0, 1)
        _add_rows(block, tile, row_grad, part_of_tokens, part_of_b)
        _add_cols(block, tile, col_grad, part_of_tokens, part_of_b)
    for dx in (dtokens, db):
        if dx is not None:
            dx.mul_(scale)
    return dtokens, db, dscale + center * grad_total(problem, grads) if needs_scale else None


def _exponentials(logits: Tensor, row: tuple[Tensor, Tensor]) -> Tensor:
    """`coef_i exp(logits_ij - lse_i)`, of the rows' (lse, coef)."""
    out = torch.empty_like(logits)
    grad_tile(logits, 1.0, row, None, None, None, out)
    return out


def _on_device(problem: Problem) -> Problem:
    """A GPU multiplies low-precision operands as they are; a CPU widens those that it would multiply slower."""
    return problem if problem.tokens.is_cuda else factors(problem)


def _tile(block: Problem) -> _Tile:
    tokens, b = block.tokens.flatten(0, 1), block.b.flatten(0, 1)
    if tokens.is_cuda and tokens.dtype in (torch.float16, torch.bfloat16):
        products = torch.mm(tokens, b.T, out_dtype=torch.float32)
    else:
        products = matmul_nt(tokens, b)
    products = products.view(*block.tokens.shape[:2], *block.b.shape[:2])
    tokens_mask, b_mask = block.tokens_mask, block.b_mask
    if tokens_mask is None and b_mask is None:
        of_tokens, of_texts = products.amax(3), products.amax(1)
        token_share = of_tokens.new_full((), 1 / products.shape[1]).expand_as(of_tokens)
        text_share = of_texts.new_full((), 1 / products.shape[3]).expand_as(of_texts)
    else:
        if tokens_mask is None:
            tokens_mask = torch.ones(block.tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if b_mask is None:
            b_mask = torch.ones(block.b.shape[:2], dtype=torch.bool, device=tokens.device)
        products.masked_fill_(~(tokens_mask[:, :, None, None] & b_mask), -torch.inf)
        counts_q = tokens_mask[:, :, None] & b_mask.any(1)  # [r, Q, c]
        counts_t = tokens_mask.any(1)[:, None, None] & b_mask  # [r, c, T]
        of_tokens = products.amax(3).masked_fill_(~counts_q, 0)
        of_texts = products.amax(1).masked_fill_(~counts_t, 0)
        token_share = counts_q / tokens_mask.sum(1).clamp(min=1)[:, None, None].to(of_tokens.dtype)
        text_share = counts_t / b_mask.sum(1).clamp(min=1)[:, None].to(of_tokens.dtype)
    row_cosines, col_cosines = (of_tokens * token_share).sum(1), (of_texts * text_share).sum(2)
    return _Tile(products, of_tokens, of_texts, row_cosines, col_cosines, token_share, text_share)


def _add_rows(block: Problem, tile: _Tile, grad: Tensor, dtokens: Tensor | None, db: Tensor | None) -> None:
    """Add the rows' dL/dS `[r, c]`: of token q, to its best t of each column."""
    if dtokens is None and db is None:
        return
    index = places(first_best(tile.products, tile.of_tokens, 3), tile.products.shape[3], 2)
    index, weight = index.flatten(0, 1), (grad[:, None] * tile.token_share).flatten(0, 1)  # [r * Q, c]
    if dtokens is not None:
        gather_sums(dtokens, index, weight, widen(block.b.flatten(0, 1)))
    if db is not None:
        scatter_sums(db, index.T, weight.T, widen(block.tokens.flatten(0, 1)))


def _add_cols(block: Problem, tile: _Tile, grad: Tensor, dtokens: Tensor | None, db: Tensor | None) -> None:
    """Add the columns' dL/dS `[r, c]`: of b's token t, to its best q of each row."""
    if dtokens is None and db is None:
        return
    index = places(first_best(tile.products, tile.of_texts, 1), tile.products.shape[1], 0)
    index, weight = index.flatten(1), (grad[:, :, None] * tile.text_share).flatten(1)  # [r, c * T]
    if db is not None:
        gather_sums(db, index.T, weight.T, widen(block.tokens.flatten(0, 1)))
    if dtokens is not None:
        scatter_sums(dtokens, index, weight, widen(block.b.flatten(0, 1)))
