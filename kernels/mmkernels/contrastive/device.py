"""The contrastive kernels: what runs on the GPU; kernel.py launches them.

Pass 1 computes each tile of logits once and takes from one exponential both directions' sums, which it leaves per
tile; a second kernel combines those. Pass 2 writes dL/dS for a chunk of rows and leaves the two products to the
GEMM library.

Both passes subtract one shift from all logits, chosen on the device from the largest norms of the features. Where no
shift will do, the call's state says so and the same kernels run with EXACT, a maximum for every row and column of a
tile; each of the two launches leaves at once where the other one is to work.
"""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mmkernels._tl import halves, product, store_tile, tile_place
from mmkernels.contrastive.device_state import LOG2_E, NOWHERE, SHARE_UNIT, UNIT, VECTORS, _center, _shift


@triton.jit
def _first(center, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr):
    """What a tile's products are added to: less their center at no cost; an exact softmax rounds as the field does."""
    first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if not EXACT:
        first -= center
    return first


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
def _shifted_sums(acc, factor, shifts, col_ptr, SYMMETRIC: tl.constexpr):
    """Sums of a part of a tile: of its columns, which are stored, and of its rows."""
    exponentials = tl.exp2(acc * factor - shifts[:, None])
    if SYMMETRIC:
        tl.store(col_ptr + tl.arange(0, acc.shape[1]), tl.sum(exponentials, 0))
    return tl.sum(exponentials, 1)


@triton.jit
def _store_softmax(ptr, plane, logits, weights, axis: tl.constexpr, HAS_CROSS: tl.constexpr):
    """The maximum of each row or column of a tile, its sum of exponentials, and of those times the weights."""
    largest = tl.max(logits, axis)
    # of nothing but minus infinity: zero, not a number
    by = tl.maximum(largest, NOWHERE)
    exponentials = tl.exp2((logits - tl.expand_dims(by, axis)) * LOG2_E)
    tl.store(ptr, largest)
    tl.store(ptr + plane, tl.sum(exponentials, axis))
    if HAS_CROSS:
        tl.store(ptr + 2 * plane, tl.sum(exponentials * weights, axis))


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


@triton.jit(do_not_specialize=["M", "N"])
def _contrastive_fwd_kernel(
    scale_ptr,
    a,  # pointers, or descriptors of tiles
    b,
    teacher_a,
    teacher_b,
    state_ptr,
    center_ptr,
    positives_ptr,  # int64 [M]
    exclude_ptr,  # int64 [M]
    row_ptr,  # [planes, column tiles, row tiles * BLOCK_M]
    col_ptr,  # [planes, row tiles, column tiles * BLOCK_N]
    positive_ptr,  # [M]: products, less their center where a shift serves
    stride_am,
    stride_bn,
    stride_tm,
    stride_tn,
    M,
    N,
    D,
    EXACT: tl.constexpr,
    ALWAYS: tl.constexpr,
    PARTS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DESCRIBED: tl.constexpr,
    IN_HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    if ALWAYS:
        scale, center = tl.load(scale_ptr).to(tl.float32), 0.0
    else:
        scale, factor, shift, center, _, serves = _shift(scale_ptr, state_ptr, center_ptr, PARTS, DIAGONAL)
        tiles = tl.where(serves != EXACT, tiles, 0)
    row_plane = tiles.to(tl.int64) * BLOCK_M
    col_plane = tiles.to(tl.int64) * BLOCK_N
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = tile_place(tile, tiles_m, tiles_n)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = _first(center, BLOCK_M, BLOCK_N, EXACT)
        acc = product(
            a, b, acc, stride_am, stride_bn, first_m, first_n, M, N, D,
            DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
        offs_m = first_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        row_ptrs = row_ptr + (pid_n.to(tl.int64) * tiles_m + pid_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        col_base = col_ptr + (pid_m.to(tl.int64) * tiles_n + pid_n) * BLOCK_N

        is_near = _is_near(positives_ptr, first_m, first_n, M, N, HAS_POSITIVES, DIAGONAL, BLOCK_M, BLOCK_N)
        if is_near:
            # columns beyond the last, and positives: few tiles have either
            offs_n = first_n + tl.arange(0, BLOCK_N)
            acc = tl.where((offs_n < N)[None, :], acc, NOWHERE)
            if HAS_POSITIVES:
                place = _place(positives_ptr, offs_m, M, N, DIAGONAL)
                is_there = (place >= first_n) & (place < first_n + BLOCK_N) & (place < N) & mask_m
                if IN_HALVES:
                    left, right = halves(acc)
                    of_row = _picked(left, place - first_n) + _picked(right, place - first_n - BLOCK_N // 2)
                else:
                    of_row = _picked(acc, place - first_n)
                tl.store(positive_ptr + offs_m, of_row, mask=is_there)

        if EXACT:
            inside = mask_m[:, None] & (first_n + tl.arange(0, BLOCK_N) < N)[None, :]
            logits = tl.where(inside, acc * scale, float("-inf"))
            logits = _seen(logits, float("-inf"), exclude_ptr, first_m, first_n, M, N, HAS_EXCLUDE)
            col_ptrs = col_base + tl.arange(0, BLOCK_N)
            if HAS_TEACHER:
                of_teacher = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                of_teacher = product(
                    teacher_a, teacher_b, of_teacher, stride_tm, stride_tn, first_m, first_n, M, N, D,
                    DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, INPUT_PRECISION,
                )  # fmt: skip
                of_teacher = tl.where(inside, of_teacher * scale, float("-inf"))
                of_teacher = _seen(of_teacher, float("-inf"), exclude_ptr, first_m, first_n, M, N, HAS_EXCLUDE)
                weights = tl.where(inside, logits, 0.0)
                weights = _seen(weights, 0.0, exclude_ptr, first_m, first_n, M, N, HAS_EXCLUDE)
                _store_softmax(row_ptrs + 2 * row_plane, row_plane, of_teacher, weights, 1, True)
                if SYMMETRIC:
                    _store_softmax(col_ptrs + 2 * col_plane, col_plane, of_teacher, weights, 0, True)
            _store_softmax(row_ptrs, row_plane, logits, logits, 1, False)
            if SYMMETRIC:
                _store_softmax(col_ptrs, col_plane, logits, logits, 0, False)
        else:
            if HAS_EXCLUDE:  # noqa: SIM102 (constexpr apart from what is known when it runs)
                if _is_there(exclude_ptr, first_m, first_n, M, N, BLOCK_M, BLOCK_N):
                    acc = _seen(acc, NOWHERE, exclude_ptr, first_m, first_n, M, N, HAS_EXCLUDE)
            # rows beyond the last are zero: they are not in the columns' sums
            shifts = tl.where(mask_m, shift, float("inf"))
            if IN_HALVES:
                left, right = halves(acc)
                sums = _shifted_sums(left, factor, shifts, col_base, SYMMETRIC)
                sums += _shifted_sums(right, factor, shifts, col_base + BLOCK_N // 2, SYMMETRIC)
            else:
                sums = _shifted_sums(acc, factor, shifts, col_base, SYMMETRIC)
            tl.store(row_ptrs, sums)


@triton.jit
def _softmaxes(
    logits,
    row_lse_ptr,
    col_lse_ptr,
    row_rest_ptr,
    col_rest_ptr,
    d_row_ptr,
    d_col_ptr,
    unit,
    offs_m,
    offs_n,
    M,
    N,
    SYMMETRIC: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """`d_row exp(x - row_lse) + d_col exp(x - col_lse)` of a tile, times the unit."""
    mask_m, mask_n = offs_m < M, offs_n < N
    row_lse = tl.load(row_lse_ptr + offs_m, mask=mask_m, other=0.0)
    row = tl.load(d_row_ptr + offs_m, mask=mask_m, other=0.0) * unit
    if HAS_REST:
        row *= tl.exp(-tl.load(row_rest_ptr + offs_m, mask=mask_m, other=0.0))
    grad = tl.exp2((logits - row_lse[:, None]) * LOG2_E) * row[:, None]
    if SYMMETRIC:
        col_lse = tl.load(col_lse_ptr + offs_n, mask=mask_n, other=0.0)
        col = tl.load(d_col_ptr + offs_n, mask=mask_n, other=0.0) * unit
        if HAS_REST:
            col *= tl.exp(-tl.load(col_rest_ptr + offs_n, mask=mask_n, other=0.0))
        grad += tl.exp2((logits - col_lse[None, :]) * LOG2_E) * col[None, :]
    return grad


@triton.jit
def _shifted_grad(
    part,
    factor,
    shifts,
    row,
    col_ptr,
    grad,
    first_m,
    first_n,
    rows,
    stride_gm,
    SYMMETRIC: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Stores dL/dS of a part of a tile, `exp2(x - shift) (row + col)`; the sums of its rows, times the products."""
    weights = row[:, None]
    if SYMMETRIC:
        weights += tl.load(col_ptr + first_n + tl.arange(0, part.shape[1]))[None, :]
    values = tl.exp2(part * factor - shifts[:, None]) * weights
    if HAS_GRAD:
        store_tile(grad, values, first_m, first_n, rows, stride_gm, DESCRIBED)
    return tl.sum(values * part, 1)


@triton.jit(do_not_specialize=["first_part", "M", "N", "first_row"], do_not_specialize_on_alignment=VECTORS[:4])
def _contrastive_bwd_kernel(
    scale_ptr,
    a,  # pointers, or descriptors of tiles
    b,
    teacher_a,
    teacher_b,
    grad,  # [chunk, N]
    state_ptr,
    positives_ptr,
    exclude_ptr,
    row_ptr,  # of a shift: the weights of the rows' and of the columns' exponentials
    col_ptr,
    row_lse_ptr,
    col_lse_ptr,
    row_rest_ptr,
    col_rest_ptr,
    d_row_ptr,
    d_col_ptr,
    teacher_row_lse_ptr,
    teacher_col_lse_ptr,
    teacher_d_row_ptr,
    teacher_d_col_ptr,
    center_ptr,
    dscale_ptr,  # [launches * programs]
    stride_am,
    stride_bn,
    stride_tm,
    stride_tn,
    stride_gm,
    first_part,
    M,
    N,
    D,
    first_row,
    EXACT: tl.constexpr,
    ALWAYS: tl.constexpr,
    PARTS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    DESCRIBED: tl.constexpr,
    IN_HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dL/dS of rows `first_row` to M in units, zero at the positives and at what is excluded; the sum of it times the
    products less their center."""
    tiles_m, tiles_n = tl.cdiv(M - first_row, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    if ALWAYS:
        scale, center = tl.load(scale_ptr).to(tl.float32), _center(state_ptr, center_ptr, DIAGONAL)
    else:
        scale, factor, shift, center, _, serves = _shift(scale_ptr, state_ptr, center_ptr, PARTS, DIAGONAL)
        tiles = tl.where(serves != EXACT, tiles, 0)
    rows = M - first_row
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = tile_place(tile, tiles_m, tiles_n)
        first_m, first_n = first_row + pid_m * BLOCK_M, pid_n * BLOCK_N
        in_chunk = pid_m * BLOCK_M
        acc = _first(center, BLOCK_M, BLOCK_N, EXACT)
        acc = product(
            a, b, acc, stride_am, stride_bn, first_m, first_n, M, N, D,
            DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
        offs_m = first_m + tl.arange(0, BLOCK_M)

        if EXACT:
            offs_n = first_n + tl.arange(0, BLOCK_N)
            values = _softmaxes(
                acc * scale, row_lse_ptr, col_lse_ptr, row_rest_ptr, col_rest_ptr, d_row_ptr, d_col_ptr,
                tl.load(state_ptr + SHARE_UNIT), offs_m, offs_n, M, N, SYMMETRIC, True,
            )  # fmt: skip
            if HAS_POSITIVES:
                # the positive's share is added in float32 by the caller
                place = _place(positives_ptr, offs_m, M, N, DIAGONAL)
                values = tl.where(offs_n[None, :] == place[:, None], 0.0, values)
            if HAS_TEACHER:
                of_teacher = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                of_teacher = product(
                    teacher_a, teacher_b, of_teacher, stride_tm, stride_tn, first_m, first_n, M, N, D,
                    DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, INPUT_PRECISION,
                )  # fmt: skip
                values += _softmaxes(
                    of_teacher * scale, teacher_row_lse_ptr, teacher_col_lse_ptr, row_rest_ptr, col_rest_ptr,
                    teacher_d_row_ptr, teacher_d_col_ptr, tl.load(state_ptr + SHARE_UNIT), offs_m, offs_n, M, N,
                    SYMMETRIC, False,
                )  # fmt: skip
            values = _seen(values, 0.0, exclude_ptr, first_m, first_n, M, N, HAS_EXCLUDE)
            if HAS_GRAD:
                store_tile(grad, values, in_chunk, first_n, rows, stride_gm, DESCRIBED)
            inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            total += tl.sum(tl.where(inside, values * (acc - center), 0.0), 1)
        else:
            is_near = _is_near(positives_ptr, first_m, first_n, M, N, HAS_POSITIVES, DIAGONAL, BLOCK_M, BLOCK_N)
            if is_near:
                offs_n = first_n + tl.arange(0, BLOCK_N)
                acc = tl.where((offs_n < N)[None, :], acc, NOWHERE)
                if HAS_POSITIVES:
                    place = _place(positives_ptr, offs_m, M, N, DIAGONAL)
                    acc = tl.where(offs_n[None, :] == place[:, None], NOWHERE, acc)
            if HAS_EXCLUDE:  # noqa: SIM102 (constexpr apart from what is known when it runs)
                if _is_there(exclude_ptr, first_m, first_n, M, N, BLOCK_M, BLOCK_N):
                    acc = _seen(acc, NOWHERE, exclude_ptr, first_m, first_n, M, N, HAS_EXCLUDE)
            row = tl.load(row_ptr + first_m + tl.arange(0, BLOCK_M))
            shifts = tl.where(offs_m < M, shift, float("inf"))
            if IN_HALVES:
                left, right = halves(acc)
                total += _shifted_grad(
                    left, factor, shifts, row, col_ptr, grad, in_chunk, first_n, rows, stride_gm,
                    SYMMETRIC, HAS_GRAD, DESCRIBED,
                )  # fmt: skip
                total += _shifted_grad(
                    right, factor, shifts, row, col_ptr, grad, in_chunk, first_n + BLOCK_N // 2, rows, stride_gm,
                    SYMMETRIC, HAS_GRAD, DESCRIBED,
                )  # fmt: skip
            else:
                total += _shifted_grad(
                    acc, factor, shifts, row, col_ptr, grad, in_chunk, first_n, rows, stride_gm,
                    SYMMETRIC, HAS_GRAD, DESCRIBED,
                )  # fmt: skip
    tl.store(dscale_ptr + first_part + tl.program_id(0), tl.sum(total, 0) / tl.load(state_ptr + UNIT))
