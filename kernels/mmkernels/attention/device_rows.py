"""What the backward kernels of attention read of rows: sums, and the keys that blocks of them see."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from mmkernels.attention.device import LOG2E, _key_range, _place


@triton.jit
def _attention_rows_kernel(
    out_ptr,
    d_out_ptr,
    lse_ptr,
    d_lse_ptr,
    rows_ptr,
    stride_gb,
    stride_gm,
    stride_gh,
    M,
    K,
    H,
    padded,
    HAS_DLSE: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of a block of queries of one head, `[B, H, 2, padded]`: the log-sum-exp in powers of two, and
    `sum_k d_out out - d_lse`; where a row sees nothing, and where there is none, infinity and zero."""
    pid_m, pid_bh, _ = _place(HEADS_FIRST)
    b64, h64 = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    offs_m, offs_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_k[None, :] < K)
    rows = offs_m.to(tl.int64)[:, None]
    out = tl.load(out_ptr + ((b64 * M + rows) * H + h64) * K + offs_k[None, :], mask=mask, other=0.0)
    d_out_ptrs = d_out_ptr + b64 * stride_gb + h64 * stride_gh + rows * stride_gm + offs_k[None, :]
    d_out = tl.load(d_out_ptrs, mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    place = pid_bh.to(tl.int64) * M + offs_m
    lse = tl.load(lse_ptr + place, mask=mask_m, other=float("-inf"))
    if HAS_DLSE:
        delta -= tl.load(d_lse_ptr + place, mask=mask_m, other=0.0)
    is_empty = lse == float("-inf")
    place = rows_ptr + pid_bh.to(tl.int64) * (2 * padded) + offs_m
    tl.store(place, tl.where(is_empty, float("inf"), lse * LOG2E))
    tl.store(place + padded, tl.where(is_empty, 0.0, delta))


@triton.jit
def _attention_spans_kernel(
    lo_ptr, hi_ptr, lo2_ptr, hi2_ptr, spans_ptr, stride_eb, M, NUM_ENDS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Of each interval of a block of queries the keys that some of them see, first and end, and those that all do:
    int32 `[B or 1, blocks, 4 or 8]`."""
    pid_b, pid_m, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    offs_m, ends = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_b * stride_eb
    spans_ptr += (pid_b * blocks + pid_m) * (2 * NUM_ENDS)
    for pair in tl.static_range(NUM_ENDS // 2):
        of_lo, of_hi = (lo_ptr, hi_ptr) if pair == 0 else (lo2_ptr, hi2_ptr)
        _, _, first, last, all_first, all_last = _key_range(of_lo + ends, of_hi + ends, offs_m, offs_m < M)
        tl.store(spans_ptr + 4 * pair, first)
        tl.store(spans_ptr + 4 * pair + 1, last)
        tl.store(spans_ptr + 4 * pair + 2, all_first)
        tl.store(spans_ptr + 4 * pair + 3, all_last)


@triton.jit
def _query_range(spans_ptr, key, key_end, blocks, NUM_ENDS: tl.constexpr):
    """The first block of queries that may see a block of keys, and the end of these."""
    first, last = blocks, 0
    for start in range(0, blocks, 64):
        offs = start + tl.arange(0, 64)
        ptrs = spans_ptr + offs * (2 * NUM_ENDS)
        inside = offs < blocks
        hits = (
            inside & (tl.load(ptrs, mask=inside, other=0) < key_end) & (tl.load(ptrs + 1, mask=inside, other=0) > key)
        )
        if NUM_ENDS == 4:
            begin, end = tl.load(ptrs + 4, mask=inside, other=0), tl.load(ptrs + 5, mask=inside, other=0)
            hits = hits | (inside & (begin < key_end) & (end > key))
        first = tl.minimum(first, tl.min(tl.where(hits, offs, blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(hits, offs + 1, 0), 0))
    return first, last


@triton.jit
def _spans_hold(spans_ptr, key, key_end, NUM_ENDS: tl.constexpr):
    """Whether all queries of a block see all keys of a block."""
    if NUM_ENDS == 0:
        return True
    holds = (tl.load(spans_ptr + 2) <= key) & (key_end <= tl.load(spans_ptr + 3))
    if NUM_ENDS == 4:
        holds = holds | ((tl.load(spans_ptr + 6) <= key) & (key_end <= tl.load(spans_ptr + 7)))
    return holds


@triton.jit
def _ends_of(lo_ptr, hi_ptr, lo2_ptr, hi2_ptr, offs_m, mask_m, NUM_ENDS: tl.constexpr):
    """The intervals of queries."""
    lo = tl.load(lo_ptr + offs_m, mask=mask_m, other=0)
    hi = tl.load(hi_ptr + offs_m, mask=mask_m, other=0)
    if NUM_ENDS == 2:
        return lo, hi, lo, hi
    lo2 = tl.load(lo2_ptr + offs_m, mask=mask_m, other=0)
    return lo, hi, lo2, tl.load(hi2_ptr + offs_m, mask=mask_m, other=0)
