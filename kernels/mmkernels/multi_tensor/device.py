"""The Triton kernels that walk a table of chunks."""

# triton types neither a constexpr nor a jitted function as what it is
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false
import triton
import triton.language as tl

NUM_COLUMNS = tl.constexpr(5)


@triton.jit
def _address(row_ptr, PLACE: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Where the chunk's part of a list begins, a pointer to its dtype."""
    digit: tl.constexpr = KIND >> (2 * PLACE) & 3
    dtype: tl.constexpr = tl.float32 if digit == 1 else tl.float16 if digit == 2 else tl.bfloat16
    ptr = tl.load(row_ptr + NUM_COLUMNS + PLACE).to(tl.pointer_type(dtype))
    if WHOLE:
        # said here, since an argument of a function would forget it
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _load(ptr, offs, n, WHOLE: tl.constexpr):
    """Elements of a chunk in float32; of a whole one by 16 bytes at a time."""
    if WHOLE:
        return tl.load(ptr + offs).to(tl.float32)
    return tl.load(ptr + offs, mask=offs < n, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, x, offs, n, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr + offs, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _stochastic(x, seed, number, first, BLOCK: tl.constexpr):
    """Float32 cut to bfloat16's bits, rounded up by the bits of `mmkernels._philox.element_bits`."""
    quads = (first // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = tl.zeros([BLOCK // 4], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quads, zero + number.to(tl.uint32), zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK)
    up = (x.to(tl.uint32, bitcast=True) + (words & 0xFFFF)) & 0xFFFF0000
    # x - x is zero of finite numbers alone
    return tl.where(x - x == 0, up.to(tl.float32, bitcast=True), x)


@triton.jit
def _ema_chunk(
    row_ptr,
    weight,
    seed,
    KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, offs = tl.load(row_ptr), tl.arange(0, BLOCK)
    target_ptr = _address(row_ptr, 0, KIND, WHOLE)
    target = _load(target_ptr, offs, n, WHOLE)
    source = _load(_address(row_ptr, 1, KIND, WHOLE), offs, n, WHOLE)
    step = source - target
    mean = tl.where(weight < 0.5, target + weight * step, source - (1 - weight) * step)
    rounded = mean
    if STOCHASTIC:
        rounded = _stochastic(mean, seed, tl.load(row_ptr + 3), tl.load(row_ptr + 4), BLOCK)
    _store(target_ptr, rounded, offs, n, WHOLE)
    if KIND >> 4 & 3 != 0:
        _store(_address(row_ptr, 2, KIND, WHOLE), mean, offs, n, WHOLE)


@triton.jit
def _ema_update_kernel(
    rows_ptr,
    weight_ptr,
    seed_ptr,
    NUM_LISTS: tl.constexpr,
    KINDS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`target + weight (source - target)` of one chunk, and a copy in the dtype of its shadow."""
    row_ptr = rows_ptr + tl.program_id(0).to(tl.int64) * (NUM_COLUMNS + NUM_LISTS)
    weight = tl.load(weight_ptr)
    seed = tl.load(seed_ptr)
    whole, kind = tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            if whole != 0:
                _ema_chunk(row_ptr, weight, seed, KINDS[i], STOCHASTIC, True, BLOCK)
            else:
                _ema_chunk(row_ptr, weight, seed, KINDS[i], STOCHASTIC, False, BLOCK)
