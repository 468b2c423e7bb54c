"""The Triton kernels that walk a table of chunks."""

# triton types neither a constexpr nor a jitted function as what it is
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportCallIssue=false
import triton
import triton.language as tl

from mmkernels._tl import Constant

NUM_COLUMNS = Constant(2)


@triton.jit
def _walk(
    chunks_ptr,
    tensors_ptr,
    args,
    CHUNK: tl.constexpr,
    NUM_LISTS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Calls CHUNK(row_ptr, number, first, n, args, KIND, WHOLE, BLOCK) for this program's chunk, in a branch of its
    kind: `row_ptr` is where the addresses begin, WHOLE says that all lists' parts are aligned and of BLOCK elements."""
    chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 3
    number, first, n = tl.load(chunk_ptr), tl.load(chunk_ptr + 1), tl.load(chunk_ptr + 2)
    row_ptr = tensors_ptr + number * (NUM_COLUMNS + NUM_LISTS)
    kind, is_aligned = tl.load(row_ptr), tl.load(row_ptr + 1)
    row_ptr += NUM_COLUMNS
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            if (n == BLOCK) & (is_aligned != 0):
                CHUNK(row_ptr, number, first, n, args, KINDS[i], True, BLOCK)
            else:
                CHUNK(row_ptr, number, first, n, args, KINDS[i], False, BLOCK)


@triton.jit
def _there(PLACE: tl.constexpr, KIND: tl.constexpr):
    """Whether a list is there."""
    return KIND >> (3 * PLACE) & 7 != 0


@triton.jit
def _address(row_ptr, first, PLACE: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Where the chunk's part of a list begins, a pointer to its dtype."""
    digit: tl.constexpr = KIND >> (3 * PLACE) & 7
    dtype: tl.constexpr = (
        tl.float32 if digit == 1 else tl.float16 if digit == 2 else tl.bfloat16 if digit == 3 else tl.uint8
    )
    ptr = tl.load(row_ptr + PLACE).to(tl.pointer_type(dtype)) + first
    if WHOLE:
        # said here, since an argument of a function would forget it
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _load_stored(row_ptr, first, offs, n, PLACE: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """A list's elements of the chunk as they are stored; of a whole one by 16 bytes at a time."""
    ptr = _address(row_ptr, first, PLACE, KIND, WHOLE)
    if WHOLE:
        return tl.load(ptr + offs)
    return tl.load(ptr + offs, mask=offs < n, other=0)


@triton.jit
def _load(row_ptr, first, offs, n, PLACE: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr):
    return _load_stored(row_ptr, first, offs, n, PLACE, KIND, WHOLE).to(tl.float32)


@triton.jit
def _store(row_ptr, first, x, offs, n, PLACE: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr):
    ptr = _address(row_ptr, first, PLACE, KIND, WHOLE)
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
def _mean(target, source, weight):
    step = source - target
    return tl.where(weight < 0.5, target + weight * step, source - (1 - weight) * step)


@triton.jit
def _ema_chunk(row_ptr, number, first, n, args, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    weight_ptr, seed_ptr, STOCHASTIC = args
    offs = tl.arange(0, BLOCK)
    target = _load(row_ptr, first, offs, n, 0, KIND, WHOLE)
    source = _load(row_ptr, first, offs, n, 1, KIND, WHOLE)
    mean = _mean(target, source, tl.load(weight_ptr))
    rounded = mean
    if STOCHASTIC:
        rounded = _stochastic(mean, tl.load(seed_ptr), number, first, BLOCK)
    _store(row_ptr, first, rounded, offs, n, 0, KIND, WHOLE)
    if _there(2, KIND):
        _store(row_ptr, first, mean, offs, n, 2, KIND, WHOLE)


@triton.jit
def _ema_update_kernel(
    chunks_ptr, tensors_ptr, weight_ptr, seed_ptr, STOCHASTIC: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr
):
    """`target + weight (source - target)` of one chunk, and a copy in the dtype of its shadow."""
    _walk(chunks_ptr, tensors_ptr, (weight_ptr, seed_ptr, STOCHASTIC), _ema_chunk, 3, KINDS, BLOCK)


@triton.jit
def _adamw_chunk(row_ptr, number, first, n, args, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    keep, rise, beta2, fall, size, root, eps, low, high, weight = args
    offs = tl.arange(0, BLOCK)
    # all loads are on their way before the first store, which none could pass
    p = _load(row_ptr, first, offs, n, 0, KIND, WHOLE)
    g = _load(row_ptr, first, offs, n, 1, KIND, WHOLE)
    m = _load(row_ptr, first, offs, n, 2, KIND, WHOLE)
    v = _load(row_ptr, first, offs, n, 3, KIND, WHOLE)
    # triton 3.6 makes a branch at run time of a function's answer, and a name of one branch is not there in the other
    HAS_AVERAGE: tl.constexpr = KIND >> 12 & 7 != 0
    if HAS_AVERAGE:
        average = _load(row_ptr, first, offs, n, 4, KIND, WHOLE)
    m = _mean(m, g, rise)
    v = beta2 * v + fall * g * g
    p = keep * p - tl.div_rn(size * m, root * tl.sqrt_rn(v) + eps)
    # comparisons that a NaN passes
    p = tl.where(p < low, low, tl.where(p > high, high, p))
    _store(row_ptr, first, p, offs, n, 0, KIND, WHOLE)
    _store(row_ptr, first, m, offs, n, 2, KIND, WHOLE)
    _store(row_ptr, first, v, offs, n, 3, KIND, WHOLE)
    if _there(5, KIND):
        _store(row_ptr, first, p, offs, n, 5, KIND, WHOLE)
    if HAS_AVERAGE:
        mean = _mean(average, p, weight)
        _store(row_ptr, first, mean, offs, n, 4, KIND, WHOLE)
        if _there(6, KIND):
            _store(row_ptr, first, mean, offs, n, 6, KIND, WHOLE)


@triton.jit
def _factor(factors_ptr, PLACE: tl.constexpr):
    return tl.load(factors_ptr + PLACE).to(tl.float32)


@triton.jit
def _adamw_update_kernel(chunks_ptr, tensors_ptr, factors_ptr, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """A step of AdamW of one chunk, and of its average."""
    args = (
        _factor(factors_ptr, 0),
        _factor(factors_ptr, 1),
        _factor(factors_ptr, 2),
        _factor(factors_ptr, 3),
        _factor(factors_ptr, 4),
        _factor(factors_ptr, 5),
        _factor(factors_ptr, 6),
        _factor(factors_ptr, 7),
        _factor(factors_ptr, 8),
        _factor(factors_ptr, 9),
    )
    _walk(chunks_ptr, tensors_ptr, args, _adamw_chunk, 7, KINDS, BLOCK)


@triton.jit
def _squares_chunk(row_ptr, number, first, n, sums_ptr, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    x = _load(row_ptr, first, tl.arange(0, BLOCK), n, 0, KIND, WHOLE)
    # by the largest's power of two, so that no square overflows and none that counts is lost; not in float64, of which
    # most GPUs do a sixty-fourth as much
    exponent = tl.max(tl.abs(x)).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    x *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    size = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x * x).to(tl.float64) * size * size)


@triton.jit
def _squares_kernel(chunks_ptr, tensors_ptr, sums_ptr, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of one chunk."""
    _walk(chunks_ptr, tensors_ptr, sums_ptr, _squares_chunk, 1, KINDS, BLOCK)


@triton.jit
def _clip_chunk(row_ptr, number, first, n, factor, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = _load(row_ptr, first, offs, n, 0, KIND, WHOLE)
    _store(row_ptr, first, factor * x, offs, n, 0, KIND, WHOLE)


@triton.jit
def _clip_kernel(chunks_ptr, tensors_ptr, norm_ptr, max_norm, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk times `min(1, max_norm / (norm + 1e-6))`, if that is not 1."""
    factor = tl.div_rn(max_norm, tl.load(norm_ptr) + 1e-6)
    # a comparison that a NaN passes
    factor = tl.where(factor > 1, 1.0, factor)
    if factor != 1:
        _walk(chunks_ptr, tensors_ptr, factor, _clip_chunk, 1, KINDS, BLOCK)


@triton.jit
def _fisher_accumulate_chunk(
    row_ptr, number, first, n, args, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    weight, decay = args
    offs = tl.arange(0, BLOCK)
    fisher = _load(row_ptr, first, offs, n, 0, KIND, WHOLE)
    grad = _load(row_ptr, first, offs, n, 1, KIND, WHOLE)
    _store(row_ptr, first, decay * fisher + weight * grad * grad, offs, n, 0, KIND, WHOLE)


@triton.jit
def _fisher_accumulate_kernel(chunks_ptr, tensors_ptr, weight, decay, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """`decay fisher + weight grad^2` of one chunk."""
    _walk(chunks_ptr, tensors_ptr, (weight, decay), _fisher_accumulate_chunk, 2, KINDS, BLOCK)


@triton.jit
def _ewc_penalty_fwd_chunk(
    row_ptr, number, first, n, sums_ptr, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.arange(0, BLOCK)
    param = _load(row_ptr, first, offs, n, 0, KIND, WHOLE)
    anchor = _load(row_ptr, first, offs, n, 1, KIND, WHOLE)
    fisher = _load(row_ptr, first, offs, n, 2, KIND, WHOLE)
    step = param - anchor
    tl.store(sums_ptr + tl.program_id(0), tl.sum(fisher * step * step).to(tl.float64))


@triton.jit
def _ewc_penalty_fwd_kernel(chunks_ptr, tensors_ptr, sums_ptr, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of `fisher (param - anchor)^2` of one chunk."""
    _walk(chunks_ptr, tensors_ptr, sums_ptr, _ewc_penalty_fwd_chunk, 3, KINDS, BLOCK)


@triton.jit
def _ewc_penalty_bwd_chunk(
    row_ptr, number, first, n, factor, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.arange(0, BLOCK)
    param = _load(row_ptr, first, offs, n, 0, KIND, WHOLE)
    anchor = _load(row_ptr, first, offs, n, 1, KIND, WHOLE)
    fisher = _load(row_ptr, first, offs, n, 2, KIND, WHOLE)
    _store(row_ptr, first, factor * fisher * (param - anchor), offs, n, 3, KIND, WHOLE)


@triton.jit
def _ewc_penalty_bwd_kernel(chunks_ptr, tensors_ptr, factor_ptr, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """The penalty's gradient of one chunk."""
    _walk(chunks_ptr, tensors_ptr, tl.load(factor_ptr), _ewc_penalty_bwd_chunk, 4, KINDS, BLOCK)


@triton.jit
def _apply_masks_chunk(row_ptr, number, first, n, args, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    first_owner, last_owner = args
    offs = tl.arange(0, BLOCK)
    owner = _load_stored(row_ptr, first, offs, n, 1, KIND, WHOLE).to(tl.int32)
    goes = ((owner < first_owner) | (owner > last_owner)) & (offs < n)
    # a chunk that is kept whole is neither read nor written
    if tl.max(goes.to(tl.int32)) != 0:
        x = _load_stored(row_ptr, first, offs, n, 0, KIND, WHOLE)
        _store(row_ptr, first, tl.where(goes, 0, x), offs, n, 0, KIND, WHOLE)


@triton.jit(do_not_specialize=["first_owner", "last_owner"])
def _apply_masks_kernel(chunks_ptr, tensors_ptr, first_owner, last_owner, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero in one chunk where the mask is not between the two."""
    _walk(chunks_ptr, tensors_ptr, (first_owner, last_owner), _apply_masks_chunk, 2, KINDS, BLOCK)
