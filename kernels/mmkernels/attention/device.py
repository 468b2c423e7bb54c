"""The Triton kernels of attention, and what they share.

A tile is BLOCK_M queries against BLOCK_N keys of one head, in float32 and in powers of two. Keys are numbered through
both segments. What a mask leaves out is skipped by whole tiles, and looked at only in tiles that it crosses.
"""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from mmkernels._tl import Constant

LOG2E = Constant(1.4426950408889634)
LN2 = Constant(0.6931471805599453)
FAR = Constant(2147483647)


@triton.jit
def _place(HEADS_FIRST: tl.constexpr):
    """A program's block of queries or keys, its head of an image, and how many of these there are.

    Blocks of one head run beside each other, to find its keys in L2; where the heads of all images are more than the
    second axis of a grid holds, they are the first.
    """
    if HEADS_FIRST:
        return tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    return tl.program_id(0), tl.program_id(1), tl.num_programs(1)


@triton.jit
def _key_range(lo_ptr, hi_ptr, offs_m, mask_m):
    """The intervals of rows, and the keys from `first` to `last` - 1 that some of them see, `full` that all do.

    Rows that are none have the interval of the last row.
    """
    lo = tl.load(lo_ptr + offs_m, mask=mask_m, other=0)
    hi = tl.load(hi_ptr + offs_m, mask=mask_m, other=0)
    some = lo < hi
    first = tl.min(tl.where(some, lo, FAR), 0)
    last = tl.max(tl.where(some, hi, 0), 0)
    full_first = tl.max(tl.where(mask_m, lo, 0), 0)
    full_last = tl.min(tl.where(mask_m, hi, FAR), 0)
    return lo, hi, first, last, full_first, full_last


@triton.jit
def _key_ranges(lo_ptr, hi_ptr, lo2_ptr, hi2_ptr, offs_m, mask_m, N, NUM_ENDS: tl.constexpr):
    """Both intervals of rows, the two runs of keys that some row sees, and the two that all rows see.

    Where the runs overlap the first is both together and the second nothing.
    """
    if NUM_ENDS == 0:
        nothing = tl.zeros_like(offs_m)
        return nothing, nothing + N, nothing, nothing, 0, N, 0, 0, 0, N, 0, 0
    lo, hi, first, last, all_first, all_last = _key_range(lo_ptr, hi_ptr, offs_m, mask_m)
    if NUM_ENDS == 2:
        nothing = tl.zeros_like(lo)
        return lo, hi, nothing, nothing, first, last, 0, 0, all_first, all_last, 0, 0
    lo2, hi2, first2, last2, all_first2, all_last2 = _key_range(lo2_ptr, hi2_ptr, offs_m, mask_m)
    joint = (first < last2) & (first2 < last)
    begin = tl.where(joint, tl.minimum(first, first2), first)
    end = tl.where(joint, tl.maximum(last, last2), last)
    begin2 = tl.where(joint, 0, first2)
    end2 = tl.where(joint, 0, last2)
    return lo, hi, lo2, hi2, begin, end, begin2, end2, all_first, all_last, all_first2, all_last2


@triton.jit
def _tile_run(run: tl.constexpr, begin, end, begin2, end2, split_first, split_last, BLOCK_N: tl.constexpr):
    """The tiles, by their first keys, of the first or the second run, within a split."""
    if run == 0:
        first, last = begin, end
    else:
        # the first run's outer tiles have seen to this one's keys in them
        before = end2 <= begin
        some = begin < end
        first = tl.where(some & (begin2 >= end), tl.maximum(begin2, tl.cdiv(end, BLOCK_N) * BLOCK_N), begin2)
        last = tl.where(some & before, tl.minimum(end2, begin // BLOCK_N * BLOCK_N), end2)
    first = tl.maximum(first // BLOCK_N * BLOCK_N, split_first)
    return first, tl.minimum(last, split_last)


@triton.jit
def _seen(lo, hi, lo2, hi2, offs_n, NUM_ENDS: tl.constexpr):
    """Which keys rows see, for vectors that broadcast."""
    seen = (lo <= offs_n) & (offs_n < hi)
    if NUM_ENDS == 4:
        seen = seen | ((lo2 <= offs_n) & (offs_n < hi2))
    return seen


@triton.jit
def _among(x, other, seen_ptr, offs_n, N):
    """`x [m, n]`, `other` where the vector of seen keys is 0."""
    seen = tl.load(seen_ptr + offs_n, mask=offs_n < N, other=0)
    return tl.where(seen[None, :] != 0, x, other)


@triton.jit
def _is_full(tile_first, tile_last, all_first, all_last, all_first2, all_last2, NUM_ENDS: tl.constexpr):
    """Whether all rows see all keys of a tile."""
    full = (all_first <= tile_first) & (tile_last <= all_last)
    if NUM_ENDS == 4:
        full = full | ((all_first2 <= tile_first) & (tile_last <= all_last2))
    return full


@triton.jit
def _load_keys(
    ptr, ptr2, stride_n, stride_n2, offs_n, offs_k, N, N1, K, HAS_SEGMENTS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows `offs_n` of keys or values, `[n, k]`, zero beyond; from N1 on those of the second segment."""
    mask_k = offs_k[None, :] < K
    rows = offs_n.to(tl.int64)[:, None]
    x = tl.load(ptr + rows * stride_n + offs_k[None, :], mask=(offs_n[:, None] < N1) & mask_k, other=0.0)
    if HAS_SEGMENTS:
        inside = (offs_n[:, None] >= N1) & (offs_n[:, None] < N) & mask_k
        x += tl.load(ptr2 + (rows - N1) * stride_n2 + offs_k[None, :], mask=inside, other=0.0)
    return x


@triton.jit
def _biased(
    logits, bias_ptr, stride_bm, stride_bn, slope, offs_m, offs_n, M, N, BIAS: tl.constexpr, HAS_SLOPES: tl.constexpr
):
    """Logits `[m, n]`, in units of ln 2, with what is added to them; -inf where a bool mask is False.

    `offs_m` and `offs_n` broadcast against the tile, so that it may lie transposed.
    """
    if HAS_SLOPES:
        distance = tl.abs(offs_m + (N - M) - offs_n).to(tl.float32)
        logits -= slope * distance * LOG2E
    if BIAS != "none":
        inside = (offs_m < M) & (offs_n < N)
        ptrs = bias_ptr + offs_m.to(tl.int64) * stride_bm + offs_n.to(tl.int64) * stride_bn
        if BIAS == "bool":
            logits = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, logits, float("-inf"))
        else:
            logits += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return logits


@triton.jit
def _kept(seed, threshold, head, offs_m, tile_first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a tile dropout keeps: the bits of `mmkernels._philox`."""
    quads = (tile_first // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], dtype=tl.uint32)
    rows = offs_m[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + quads, zero + rows, zero + head.to(tl.uint32), zero)
    # word w of counter c is key 4 c + w
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k2_ptr,
    v2_ptr,
    lo_ptr,
    hi_ptr,
    lo2_ptr,
    hi2_ptr,
    bias_ptr,
    slopes_ptr,
    seed_ptr,
    seen_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_k2b,
    stride_k2n,
    stride_k2h,
    stride_v2b,
    stride_v2n,
    stride_v2h,
    stride_eb,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_sb,
    stride_yb,
    M,
    N,
    N1,
    K,
    H,
    groups,
    split_keys,
    scale,
    threshold,
    keep_scale,
    NUM_ENDS: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of queries of one head against the keys of one split: out `[split, B, M, H, K]`, lse
    `[split, B, H, M]`."""
    pid_m, pid_bh, num_bh = _place(HEADS_FIRST)
    pid_s = tl.program_id(2)
    b, h = pid_bh // H, pid_bh % H
    b64, h64, g64 = b.to(tl.int64), h.to(tl.int64), (h // groups).to(tl.int64)
    offs_m, offs_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)[:, None]
    mask_q = mask_m[:, None] & (offs_k[None, :] < K)
    q = tl.load(q_ptr + b64 * stride_qb + h64 * stride_qh + rows * stride_qm + offs_k[None, :], mask=mask_q, other=0.0)
    ends = b64 * stride_eb
    lo, hi, lo2, hi2, begin, end, begin2, end2, all_first, all_last, all_first2, all_last2 = _key_ranges(
        lo_ptr + ends, hi_ptr + ends, lo2_ptr + ends, hi2_ptr + ends, offs_m, mask_m, N, NUM_ENDS
    )
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + b64 * stride_sb + h)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for run in tl.static_range(NUM_ENDS // 4 + 1):
        first, last = _tile_run(run, begin, end, begin2, end2, pid_s * split_keys, (pid_s + 1) * split_keys, BLOCK_N)
        for tile in range(first, last, BLOCK_N):
            offs_n = tile + tl.arange(0, BLOCK_N)
            k = _load_keys(
                k_ptr + b64 * stride_kb + g64 * stride_kh,
                k2_ptr + b64 * stride_k2b + g64 * stride_k2h,
                stride_kn,
                stride_k2n,
                offs_n,
                offs_k,
                N,
                N1,
                K,
                HAS_SEGMENTS,
                BLOCK_K,
            )
            logits = tl.dot(q, k.T, input_precision=INPUT_PRECISION) * (scale * LOG2E)
            logits = _biased(
                logits,
                bias_ptr + b64 * stride_bb + h64 * stride_bh,
                stride_bm,
                stride_bn,
                slope,
                offs_m[:, None],
                offs_n[None, :],
                M,
                N,
                BIAS,
                HAS_SLOPES,
            )
            if not _is_full(tile, tile + BLOCK_N, all_first, all_last, all_first2, all_last2, NUM_ENDS):
                seen = _seen(lo[:, None], hi[:, None], lo2[:, None], hi2[:, None], offs_n[None, :], NUM_ENDS)
                logits = tl.where(seen, logits, float("-inf"))
            if HAS_SEEN:
                logits = _among(logits, float("-inf"), seen_ptr + b64 * stride_yb, offs_n, N)
            above = tl.maximum(largest, tl.max(logits, 1))
            # -inf - -inf would be NaN
            shift = tl.where(above == float("-inf"), 0.0, above)
            weights = tl.exp2(logits - shift[:, None])
            shrink = tl.exp2(largest - shift)
            total = total * shrink + tl.sum(weights, 1)
            if HAS_DROPOUT:
                keep = _kept(seed, threshold, pid_bh, offs_m, tile, BLOCK_M, BLOCK_N)
                weights = tl.where(keep, weights * keep_scale, 0.0)
            v = _load_keys(
                v_ptr + b64 * stride_vb + g64 * stride_vh,
                v2_ptr + b64 * stride_v2b + g64 * stride_v2h,
                stride_vn,
                stride_v2n,
                offs_n,
                offs_k,
                N,
                N1,
                K,
                HAS_SEGMENTS,
                BLOCK_K,
            )
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
            largest = above
    divisor = tl.where(total == 0, 1.0, total)
    out = acc / divisor[:, None]
    lse = tl.where(total == 0, float("-inf"), (largest + tl.log2(divisor)) * LN2)
    B = num_bh // H
    place = pid_s.to(tl.int64) * B + b64
    out_ptrs = out_ptr + ((place * M + rows) * H + h64) * K + offs_k[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptr + (place * H + h64) * M + offs_m, lse, mask=mask_m)
