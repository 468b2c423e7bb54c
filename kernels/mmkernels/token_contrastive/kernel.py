"""Token-contrastive statistics and their gradient in Triton: the products of tokens are recomputed tile by tile
and never stored whole.
"""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels._launch import CHUNK_BYTES, Launch, Table, launch, launch_config, processors, tile_flags
from mmkernels._numerics import combine_sums
from mmkernels._tl import addmm_fp32_, is_described, pitched, tile_operand
from mmkernels.token_contrastive.device import _token_contrastive_bwd_kernel, _token_contrastive_fwd_kernel
from mmkernels.token_contrastive.device_vectors import _token_contrastive_combine_kernel
from mmkernels.token_contrastive.problem import (
    Problem,
    TokenContrastiveStats,
    Weights,
    field_sizes,
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
# Warps of a processor: of several programs one's products run beside another's sums.
WARPS = 16
# Of vectors.
BLOCK = 32
# Elements that a descriptor's rows are a multiple of.
VECTOR = 8

# `block_m` counts tokens.
TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 64, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd", 2, 100): Launch(128, 128, 64, 8, 2),
    ("fwd", 4, 80): Launch(64, 128, 16, 8, 3),
    ("fwd", 4, 90): Launch(64, 128, 16, 8, 3),
    ("fwd", 4, 100): Launch(32, 64, 16, 4, 3),
    ("bwd", 2, 80): Launch(64, 64, 32, 4, 4),
    ("bwd", 2, 90): Launch(128, 128, 64, 8, 2),
    ("bwd", 2, 100): Launch(128, 128, 64, 8, 2),
    ("bwd", 4, 80): Launch(64, 128, 16, 8, 3),
    ("bwd", 4, 90): Launch(64, 128, 16, 8, 3),
    ("bwd", 4, 100): Launch(64, 128, 16, 8, 3),
}


def token_contrastive_fwd(problem: Problem) -> TokenContrastiveStats:
    """The statistics of `S = scale * max_q <tokens_q, b>`, of as many rows at a time as leave CHUNK_BYTES of sums."""
    num_rows, num_cols = problem.shape
    config = launch_config(TABLE, "fwd", problem.tokens)
    tile_rows, _ = tile_of_tokens(problem.tokens.shape[1], config)
    of_tiles = 4 * _num_planes(problem) * triton.cdiv(num_cols, config.block_n) * (config.block_n + tile_rows)
    at_once = max(CHUNK_BYTES // max(of_tiles, 1), 1) * tile_rows
    if num_rows <= at_once:
        return _statistics(problem)
    starts, cols = range(0, num_rows, at_once), slice(0, num_cols)
    return _joined([_statistics(problem.block(slice(first, first + at_once), cols)) for first in starts])


def _num_planes(problem: Problem) -> int:
    """What a tile leaves of each of its rows and columns: maximum, sum, total and matched."""
    return 4 if problem.row_labels is not None else 3 if problem.with_totals else 2


def _statistics(problem: Problem) -> TokenContrastiveStats:
    tokens, (num_rows, num_cols), num_planes = problem.tokens, problem.shape, _num_planes(problem)
    stats = TokenContrastiveStats(*(tokens.new_empty(size, dtype=torch.float32) for size in field_sizes(problem)))
    config = launch_config(TABLE, "fwd", tokens)
    tile_rows, block_q = tile_of_tokens(tokens.shape[1], config)
    tiles = triton.cdiv(num_rows, tile_rows), triton.cdiv(num_cols, config.block_n)
    num_tiles, flags, indices = tiles[0] * tiles[1], _flags(problem), _index_operands(problem)
    of_rows = tokens.new_empty(num_planes * num_tiles * tile_rows, dtype=torch.float32)
    of_cols = tokens.new_empty(num_planes * num_tiles * config.block_n, dtype=torch.float32)
    logits = torch.empty_like(stats.positive)
    if num_tiles:
        operands, strides = _operands(problem, config)
        launch(
            _token_contrastive_fwd_kernel,
            (_programs(num_tiles, config, tokens),),
            problem.scale,
            *operands,
            *indices,
            of_rows,
            of_cols,
            logits,
            *strides,
            num_rows,
            num_cols,
            *tokens.shape[1:],
            HAS_MASK=problem.tokens_mask is not None,
            **flags,
            **_tiling(problem, config),
        )
    if num_rows + num_cols:
        launch(
            _token_contrastive_combine_kernel,
            (triton.cdiv(max(num_rows, num_cols), BLOCK),),
            of_rows,
            of_cols,
            logits,
            indices[1],
            *(x for name, x in stats._asdict().items() if name != "col_positive"),
            num_rows,
            num_cols,
            *tiles,
            **flags,
            BLOCK_N=config.block_n,
            ROWS=config.block_m // block_q,
            BLOCK=BLOCK,
        )
    return stats


def _joined(parts: list[TokenContrastiveStats]) -> TokenContrastiveStats:
    """The statistics of all rows, from those of parts of them against the same columns."""
    of_rows = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("row_lse", "positive", "row_total", "row_matched", "row_rest")
    }
    of_cols = {
        name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("col_total", "col_matched")
    }
    # float64: the rests are what makes them exact
    lse = torch.stack([part.col_lse.double() + part.col_rest for part in parts])
    exact, _ = combine_sums(lse, torch.ones_like(lse))
    col_lse = exact.float()
    col_rest = (exact - col_lse).float().nan_to_num_(0.0, 0.0, 0.0)
    return parts[0]._replace(col_lse=col_lse, col_rest=col_rest, **of_rows, **of_cols)


def token_contrastive_bwd(
    problem: Problem, stats: TokenContrastiveStats, grads: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `tokens` (in its dtype), `b` and `scale` (in float32), those that `needs` asks for."""
    needs_tokens, needs_b, needs_scale = needs
    (num_rows, num_cols), (_, num_tokens, width) = problem.shape, problem.tokens.shape
    weights = weights_of(stats, grads)
    unit = _unit(weights)
    weights = weights.times(unit)
    tile_rows, _ = tile_of_tokens(num_tokens, launch_config(TABLE, "bwd", problem.tokens))
    fitting = chunk_rows(num_tokens, num_cols, problem.tokens.element_size())
    chunk = max(min(triton.cdiv(fitting, tile_rows) * tile_rows, num_rows), 1)
    has_grad = needs_tokens or needs_b
    grad = pitched(problem.tokens, num_cols, chunk * num_tokens) if has_grad else None
    dtokens = torch.empty_like(problem.tokens, memory_format=torch.contiguous_format) if needs_tokens else None
    db = problem.b.new_zeros(problem.b.shape, dtype=torch.float32) if needs_b else None
    center, factor, of_programs = mean_cosine(problem), problem.scale / unit, [unit.new_zeros(1)]
    for first in range(0, num_rows, chunk):
        rows, cols = slice(first, first + chunk), slice(0, num_cols)
        block = problem if num_rows <= chunk else problem.block(rows, cols)
        part = None if grad is None else grad[:, : len(block.tokens) * num_tokens]
        of_programs.append(_grad_chunk(block, stats.of_rows(rows), weights.block(rows, cols), center, part))
        if part is not None and dtokens is not None:
            product = torch.empty(len(part.T), width, dtype=torch.float32, device=part.device)
            addmm_fp32_(product, part.T, problem.b, beta=0.0)
            torch.mul(product.view(-1, num_tokens, width), factor, out=dtokens[rows])
        if part is not None and db is not None:
            addmm_fp32_(db, part, block.tokens.flatten(0, 1))
    if db is not None:
        db.mul_(factor)
    if not needs_scale:
        return dtokens, db, None
    return dtokens, db, torch.cat(of_programs).sum() / unit + center * grad_total(problem, grads)


def chunk_rows(num_tokens: int, num_cols: int, element_size: int) -> int:
    """Rows, of `num_tokens` each, whose dL/dS pass 2 holds at a time."""
    fitting = CHUNK_BYTES // max(num_cols * num_tokens * element_size, 1)
    return max(fitting, MIN_CHUNK_TOKENS // num_tokens, 1)


def tile_of_tokens(num_tokens: int, config: Launch) -> tuple[int, int]:
    """Rows of a tile and how many tokens it holds of each: all of them, or a block of so many."""
    block_q = min(max(1 << (num_tokens - 1).bit_length(), MIN_BLOCK_Q), MAX_BLOCK_Q)
    return config.block_m // block_q, block_q


def _programs(num_tiles: int, config: Launch, x: Tensor) -> int:
    """As many as run at a time, each of several tiles."""
    held = WARPS // config.num_warps if x.is_cuda else 1
    return min(num_tiles, held * processors(x))


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


def _flags(problem: Problem) -> dict[str, bool]:
    """Those that all kernels of tiles have."""
    return {
        "HAS_POSITIVES": problem.positives is not None,
        "HAS_LABELS": problem.row_labels is not None,
        "HAS_TOTALS": problem.with_totals,
    }


def _operands(problem: Problem, config: Launch) -> tuple[list[Any], tuple[int, int]]:
    """Tokens and b as the kernels read them, and the strides of their rows: of descriptors the tokens' `[M, Q, D]`."""
    tile_rows, block_q = tile_of_tokens(problem.tokens.shape[1], config)
    tokens = tile_operand(problem.tokens.flatten(0, 1), config.block_m, config)
    b = tile_operand(problem.b, config.block_n, config)
    if not is_described(problem.tokens):
        return [tokens, b], (tokens.stride(0), b.stride(0))
    (_, num_tokens, _), stride = problem.tokens.shape, tokens.strides[0]
    strides, block = [num_tokens * stride, stride, 1], [tile_rows, block_q, config.block_d]
    return [TensorDescriptor(tokens.base, list(problem.tokens.shape), strides, block), b], (stride, b.strides[0])


def _tiling(problem: Problem, config: Launch) -> dict[str, Any]:
    num_tokens = problem.tokens.shape[1]
    _, block_q = tile_of_tokens(num_tokens, config)
    return {
        "IS_WHOLE": num_tokens % block_q == 0,
        "IS_SINGLE": num_tokens <= block_q,
        "DESCRIBED": is_described(problem.tokens),
        "BLOCK_Q": block_q,
        **tile_flags(config),
    }


def _grad_chunk(
    block: Problem, stats: TokenContrastiveStats, weights: Weights, center: Tensor, out: Tensor | None
) -> Tensor:
    """Write dL/d(products) of the block's rows into `out` `[N, M * Q]`; returns parts of the scale's gradient."""
    (num_rows, num_cols), (_, num_tokens, width) = block.shape, block.tokens.shape
    config = launch_config(TABLE, "bwd", block.tokens)
    tile_rows, block_q = tile_of_tokens(num_tokens, config)
    num_tiles = triton.cdiv(num_rows, tile_rows) * triton.cdiv(num_cols, config.block_n)
    programs = _programs(num_tiles, config, block.tokens)
    of_programs = center.new_empty(programs)
    if not num_tiles:
        return of_programs
    operands, strides = _operands(block, config)
    in_vectors = is_described(block.tokens) and num_tokens % VECTOR == 0
    stored: Any = out
    if out is not None and in_vectors:
        strides_g, of_tile = [out.stride(0), num_tokens, 1], [config.block_n, tile_rows, block_q]
        stored = TensorDescriptor(out, [num_cols, num_rows, num_tokens], strides_g, of_tile)
    launch(
        _token_contrastive_bwd_kernel,
        (programs,),
        block.scale,
        *operands,
        stored,
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
        of_programs,
        *strides,
        0 if out is None else out.stride(0),
        num_rows,
        num_cols,
        num_tokens,
        width,
        HAS_MASK=block.tokens_mask is not None,
        HAS_GRAD=out is not None,
        IN_VECTORS=in_vectors,
        **_flags(block),
        **_tiling(block, config),
    )
    return of_programs
