"""Which columns of a tile are its rows' own: their positives, and those that they do not see."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _place(ptr, offs_m, M, N, DIAGONAL: tl.constexpr):
    """A column of each row, as of its positive; -1 for none."""
    if DIAGONAL:
        place = offs_m
    else:
        # int64 in what is given: beyond 32 bits there is no column
        place = tl.load(ptr + offs_m, mask=offs_m < M, other=-1)
        place = tl.where((place >= 0) & (place < N), place, -1).to(tl.int32)
    return place


@triton.jit
def _is_there(ptr, first_m, first_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile has any of its rows' columns."""
    place = _place(ptr, first_m + tl.arange(0, BLOCK_M), M, N, False)
    return tl.max(((place >= first_n) & (place < first_n + BLOCK_N)).to(tl.int32), 0) > 0


@triton.jit
def _is_near(
    positives_ptr,
    first_m,
    first_n,
    M,
    N,
    HAS_POSITIVES: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether a tile has columns beyond the last, or positives."""
    is_near = first_n + BLOCK_N > N
    if HAS_POSITIVES:
        if DIAGONAL:
            is_near = is_near | ((first_m < first_n + BLOCK_N) & (first_n < first_m + BLOCK_M))
        else:
            # loaded again where it is wanted: kept, the places would cost registers
            is_near = is_near | _is_there(positives_ptr, first_m, first_n, M, N, BLOCK_M, BLOCK_N)
    return is_near


@triton.jit
def _seen(tile, value, exclude_ptr, first_m, first_n, M, N, HAS_EXCLUDE: tl.constexpr):
    """A tile with a value where a row does not see a column."""
    if HAS_EXCLUDE:
        place = _place(exclude_ptr, first_m + tl.arange(0, tile.shape[0]), M, N, False)
        offs_n = first_n + tl.arange(0, tile.shape[1])
        tile = tl.where(offs_n[None, :] == place[:, None], value, tile)
    return tile


@triton.jit
def _picked(tile, place):
    """Of each row the value in the column `place`, zero where that is outside."""
    return tl.sum(tl.where(tl.arange(0, tile.shape[1])[None, :] == place[:, None], tile, 0.0), 1)
