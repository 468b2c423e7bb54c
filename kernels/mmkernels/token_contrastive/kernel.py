"""Token-contrastive statistics and their gradient in Triton: the products of tokens are recomputed tile by tile
and never stored whole.
"""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mmkernels._launch import CHUNK_BYTES, MAX_PROGRAMS, Launch, Table, input_precision, launch, launch_config
from mmkernels._numerics import combine_sums
from mmkernels._tl import addmm_fp32_, operand, pitched
from mmkernels.token_contrastive.device import _token_contrastive_bwd_kernel, _token_contrastive_fwd_kernel
from mmkernels.token_contrastive.problem import (
    Problem,
    TokenContrastiveStats,
    Weights,
    empty_positives,
    grad_total,
    mean_cosine,
    weights_of,
)

# dL/dS is stored in the operands' dtype, its largest possible entry moved here: float16 then keeps 28 binades
# below it.
GRAD_CEILING = 2.0**14
# Pass 2 holds CHUNK_BYTES of dL/dS, but never of fewer tokens than keep a GEMM busy.
MIN_CHUNK_TOKENS = 1024
# Tokens of a row in a tile, a power of two: fewer are padded, of more block follows block. Q = 32 is the field's;
# of other blocks than these, some row of the table would spill.
MIN_BLOCK_Q, MAX_BLOCK_Q = 16, 32

# `block_m` counts tokens.
TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 64, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd", 2, 100): Launch(128, 64, 64, 8, 3),
    ("fwd", 4, 80): Launch(64, 128, 16, 8, 3),
    ("fwd", 4, 90): Launch(64, 128, 16, 8, 3),
    ("fwd", 4, 100): Launch(64, 128, 16, 8, 3),
    ("bwd", 2, 80): Launch(128, 64, 32, 8, 4),
    ("bwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("bwd", 2, 100): Launch(128, 128, 64, 8, 3),
    ("bwd", 4, 80): Launch(64, 128, 16, 8, 3),
    ("bwd", 4, 90): Launch(64, 128, 16, 8, 3),
    ("bwd", 4, 100): Launch(64, 128, 16, 8, 3),
}


def token_contrastive_fwd(problem: Problem) -> TokenContrastiveStats:
    """The statistics of `S = scale * max_q <tokens_q, b>`."""
    (num_rows, num_cols), num_tokens = problem.shape, problem.tokens.shape[1]
    config = launch_config(TABLE, "fwd", problem.tokens)
    tokens, b = operand(problem.tokens.flatten(0, 1), config.block_d), operand(problem.b, config.block_d)
    tile_rows, block_q = tile_of_tokens(num_tokens, config)
    programs = min(triton.cdiv(num_rows, tile_rows), MAX_PROGRAMS)
    col_tiles = max(triton.cdiv(num_cols, config.block_n), 1)
    # few rows alone would leave processors idle: cut the columns as well
    tiles_per_split = triton.cdiv(col_tiles, min(max(MAX_PROGRAMS // max(programs, 1), 1), col_tiles))
    splits = triton.cdiv(col_tiles, tiles_per_split)
    has_labels = problem.row_labels is not None
    fields = 4 if has_labels else 3 if problem.with_totals else 2
    of_rows = tokens.new_empty(fields, splits, num_rows, dtype=torch.float32)
    of_cols = pitched(tokens.new_empty(0, dtype=torch.float32), fields * programs, num_cols)
    of_cols = of_cols.unflatten(0, (fields, programs))
    positive = empty_positives(problem)
    if num_rows:
        launch(
            _token_contrastive_fwd_kernel,
            (programs, splits),
            tokens,
            b,
            problem.scale,
            *_index_operands(problem),
            of_rows,
            of_cols,
            positive,
            *tokens.stride(),
            *b.stride(),
            of_rows.stride(0),
            of_cols.stride(0),
            of_cols.stride(1),
            num_rows,
            num_cols,
            num_tokens,
            tokens.shape[1],
            tiles_per_split * config.block_n,
            HAS_MASK=problem.tokens_mask is not None,
            HAS_POSITIVES=problem.positives is not None,
            HAS_LABELS=has_labels,
            HAS_TOTALS=problem.with_totals,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_Q=block_q,
            BLOCK_D=config.block_d,
            INPUT_PRECISION=input_precision(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    row_lse, row_rest = combine_sums(of_rows[0], of_rows[1])
    col_lse, col_rest = combine_sums(of_cols[0], of_cols[1])
    none = positive.new_empty(0)
    total = [x[2].sum(0) for x in (of_rows, of_cols)] if problem.with_totals else (none, none.clone())
    matched = [x[3].sum(0) for x in (of_rows, of_cols)] if has_labels else (none.clone(), none.clone())
    return TokenContrastiveStats(row_lse, col_lse, positive, none.clone(), *total, *matched, row_rest, col_rest)


def token_contrastive_bwd(
    problem: Problem, stats: TokenContrastiveStats, grads: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `tokens` (in its dtype), `b` and `scale` (in float32), those that `needs` asks for."""
    needs_tokens, needs_b, needs_scale = needs
    (num_rows, num_cols), (_, num_tokens, width) = problem.shape, problem.tokens.shape
    weights = weights_of(stats, grads)
    unit = _unit(weights)
    weights = weights.times(unit)
    # whole tiles, so that every product has the place in its tile that it had in pass 1, and so its bits
    tile_rows, _ = tile_of_tokens(num_tokens, launch_config(TABLE, "fwd", problem.tokens))
    fitting = chunk_rows(num_tokens, num_cols, problem.tokens.element_size())
    chunk = max(min(triton.cdiv(fitting, tile_rows) * tile_rows, num_rows), 1)
    stored = chunk * num_tokens if needs_tokens or needs_b else 0
    grad = pitched(problem.tokens, num_cols, stored)
    dtokens = torch.empty_like(problem.tokens, memory_format=torch.contiguous_format) if needs_tokens else None
    db = problem.b.new_zeros(problem.b.shape, dtype=torch.float32) if needs_b else None
    center, dscale = mean_cosine(problem), []
    for first in range(0, num_rows, chunk):
        rows, cols = slice(first, first + chunk), slice(0, num_cols)
        block = problem.block(rows, cols)
        dscale.append(_grad_chunk(block, stats.of_rows(rows), weights.block(rows, cols), center, grad, needs_scale))
        part = grad[:, : len(block.tokens) * num_tokens]
        if dtokens is not None:
            product = torch.empty(len(part.T), width, dtype=torch.float32, device=part.device)
            addmm_fp32_(product, part.T, problem.b, beta=0.0)
            dtokens[rows] = product.div_(unit).mul_(problem.scale).view(-1, num_tokens, width)
        if db is not None:
            addmm_fp32_(db, part, block.tokens.flatten(0, 1))
    if db is not None:
        db.div_(unit).mul_(problem.scale)
    if not needs_scale:
        return dtokens, db, None
    of_tiles = torch.cat([*dscale, unit.new_zeros(1)]).sum() / unit
    return dtokens, db, of_tiles + center * grad_total(problem, grads)


def chunk_rows(num_tokens: int, num_cols: int, element_size: int) -> int:
    """Rows, of `num_tokens` each, whose dL/dS pass 2 holds at a time."""
    fitting = CHUNK_BYTES // max(num_cols * num_tokens * element_size, 1)
    return max(fitting, MIN_CHUNK_TOKENS // num_tokens, 1)


def tile_of_tokens(num_tokens: int, config: Launch) -> tuple[int, int]:
    """Rows of a tile and how many tokens it holds of each: all of them, or a block of so many."""
    block_q = min(max(1 << (num_tokens - 1).bit_length(), MIN_BLOCK_Q), MAX_BLOCK_Q)
    return config.block_m // block_q, block_q


def _unit(weights: Weights) -> Tensor:
    """What dL/dS is multiplied by, so that its largest possible entry is near the ceiling: a power of two, which
    rounds none of the weights that cancel one another."""
    largest = [x.abs().amax() for x in weights if x.numel()]
    ceiling = torch.stack(largest).sum() if largest else weights.row.new_ones(())
    return GRAD_CEILING / torch.exp2(torch.log2(ceiling.clamp(1e-30)).ceil())


def _index_operands(problem: Problem) -> list[Tensor | None]:
    """The mask, the positives and both labels as kernels read them; None where absent."""
    mask = None if problem.tokens_mask is None else problem.tokens_mask.contiguous().view(torch.uint8)
    labels = (problem.positives, problem.row_labels, problem.col_labels)
    return [mask, *(None if x is None else x.contiguous() for x in labels)]


def _grad_chunk(
    block: Problem, stats: TokenContrastiveStats, weights: Weights, center: Tensor, out: Tensor, needs_scale: bool
) -> Tensor:
    """Write dL/d(products) of the block's rows into `out`; returns partials of the scale's gradient."""
    (num_rows, num_cols), num_tokens = block.shape, block.tokens.shape[1]
    config = launch_config(TABLE, "bwd", block.tokens)
    tokens, b = operand(block.tokens.flatten(0, 1), config.block_d), operand(block.b, config.block_d)
    tile_rows, block_q = tile_of_tokens(num_tokens, config)
    grid = (triton.cdiv(num_rows, tile_rows), triton.cdiv(num_cols, config.block_n))
    dscale = tokens.new_empty(grid[1] * num_rows if needs_scale else 0, dtype=torch.float32)
    launch(
        _token_contrastive_bwd_kernel,
        grid,
        tokens,
        b,
        block.scale,
        *_index_operands(block),
        stats.row_lse,
        stats.col_lse,
        weights.row,
        weights.col,
        weights.positive,
        weights.row_total,
        weights.col_total,
        weights.row_matched,
        weights.col_matched,
        center,
        out,
        dscale,
        *tokens.stride(),
        *b.stride(),
        out.stride(0),
        num_rows,
        num_cols,
        num_tokens,
        tokens.shape[1],
        HAS_MASK=block.tokens_mask is not None,
        HAS_POSITIVES=block.positives is not None,
        HAS_LABELS=block.row_labels is not None,
        HAS_TOTALS=block.with_totals,
        HAS_GRAD=out.numel() > 0,
        HAS_DSCALE=needs_scale,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_Q=block_q,
        BLOCK_D=config.block_d,
        INPUT_PRECISION=input_precision(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dscale
