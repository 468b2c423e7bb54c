"""The Triton kernels of attention's backward: each gradient is written once, by one program."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from mmkernels.attention.device import (
    LOG2E,
    _among,
    _biased,
    _is_full,
    _kept,
    _key_ranges,
    _load_keys,
    _place,
    _seen,
    _tile_run,
)
from mmkernels.attention.device_rows import _ends_of, _query_range, _spans_hold


@triton.jit
def _attention_bwd_q_kernel(
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
    d_out_ptr,
    rows_ptr,
    dq_ptr,
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
    stride_gb,
    stride_gm,
    stride_gh,
    padded,
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
    """dq `[split, B, M, H, K]` of one block of queries of one head, from the keys of one split.

    `rows`: see `_attention_rows_kernel`.
    """
    pid_m, pid_bh, num_bh = _place(HEADS_FIRST)
    pid_s = tl.program_id(2)
    b, h = pid_bh // H, pid_bh % H
    b64, h64, g64 = b.to(tl.int64), h.to(tl.int64), (h // groups).to(tl.int64)
    offs_m, offs_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)[:, None]
    mask_q = mask_m[:, None] & (offs_k[None, :] < K)
    q = tl.load(q_ptr + b64 * stride_qb + h64 * stride_qh + rows * stride_qm + offs_k[None, :], mask=mask_q, other=0.0)
    d_out_ptrs = d_out_ptr + b64 * stride_gb + h64 * stride_gh + rows * stride_gm + offs_k[None, :]
    d_out = tl.load(d_out_ptrs, mask=mask_q, other=0.0)
    of_rows = rows_ptr + pid_bh.to(tl.int64) * (2 * padded) + offs_m
    lse, delta = tl.load(of_rows), tl.load(of_rows + padded)
    ends = b64 * stride_eb
    lo, hi, lo2, hi2, begin, end, begin2, end2, all_first, all_last, all_first2, all_last2 = _key_ranges(
        lo_ptr + ends, hi_ptr + ends, lo2_ptr + ends, hi2_ptr + ends, offs_m, mask_m, N, NUM_ENDS
    )
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + b64 * stride_sb + h)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dq = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
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
            # a product and a difference that are one instruction, with no mask between
            weights = tl.exp2(logits - lse[:, None])
            if not _is_full(tile, tile + BLOCK_N, all_first, all_last, all_first2, all_last2, NUM_ENDS):
                seen = _seen(lo[:, None], hi[:, None], lo2[:, None], hi2[:, None], offs_n[None, :], NUM_ENDS)
                weights = tl.where(seen, weights, 0.0)
            if HAS_SEEN:
                weights = _among(weights, 0.0, seen_ptr + b64 * stride_yb, offs_n, N)
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
            d_weights = tl.dot(d_out, v.T, input_precision=INPUT_PRECISION)
            if HAS_DROPOUT:
                keep = _kept(seed, threshold, pid_bh, offs_m, tile, BLOCK_M, BLOCK_N)
                d_weights = tl.where(keep, d_weights * keep_scale, 0.0)
            d_logits = weights * (d_weights - delta[:, None])
            dq = tl.dot(d_logits.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
    B = num_bh // H
    out_rows = (pid_s.to(tl.int64) * B + b64) * M + rows
    dq_ptrs = dq_ptr + (out_rows * H + h64) * K + offs_k[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _attention_bwd_k_kernel(
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
    d_out_ptr,
    rows_ptr,
    spans_ptr,
    dk_ptr,
    dv_ptr,
    dk2_ptr,
    dv2_ptr,
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
    stride_gb,
    stride_gm,
    stride_gh,
    padded,
    stride_rb,
    M,
    N,
    N1,
    K,
    H,
    groups,
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
    """dk and dv `[B, Lk_s, Hkv, K]` of one block of keys of one key head, from all queries of its group.

    `rows`: see `_attention_rows_kernel`. `spans`: of each block of queries, see `_attention_spans_kernel`. Only tiles
    that these do not hold whole load the ends of their queries: a pipelined loop would buffer them for every tile.
    A key has gradients of its own row alone, so that those that are not seen are left out at the end.
    """
    pid_n, pid_bg, _ = _place(HEADS_FIRST)
    num_key_heads = H // groups
    b, g = pid_bg // num_key_heads, pid_bg % num_key_heads
    b64, g64 = b.to(tl.int64), g.to(tl.int64)
    offs_n, offs_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
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
    first, last, key = 0, M, pid_n * BLOCK_N
    if NUM_ENDS > 0:
        spans_ptr += b64 * stride_rb
        lo_ptr += b64 * stride_eb
        hi_ptr += b64 * stride_eb
        lo2_ptr += b64 * stride_eb
        hi2_ptr += b64 * stride_eb
        first, last = _query_range(spans_ptr, key, key + BLOCK_N, tl.cdiv(M, BLOCK_M), NUM_ENDS)
        first *= BLOCK_M
        last = tl.minimum(last * BLOCK_M, M)
    if HAS_SEEN:
        seen_keys = tl.load(seen_ptr + b64 * stride_yb + offs_n, mask=offs_n < N, other=0).to(tl.int32)
        last = tl.where(tl.max(seen_keys, 0) > 0, last, first)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for head in range(0, groups):
        h = g * groups + head
        h64, bh = h.to(tl.int64), b * H + h
        of_head = rows_ptr + bh.to(tl.int64) * (2 * padded)
        slope = 0.0
        if HAS_SLOPES:
            slope = tl.load(slopes_ptr + b64 * stride_sb + h)
        for tile in range(first, last, BLOCK_M):
            offs_m = tile + tl.arange(0, BLOCK_M)
            mask_m = offs_m < M
            mask_q = mask_m[:, None] & (offs_k[None, :] < K)
            rows = offs_m.to(tl.int64)[:, None]
            q_ptrs = q_ptr + b64 * stride_qb + h64 * stride_qh + rows * stride_qm + offs_k[None, :]
            q = tl.load(q_ptrs, mask=mask_q, other=0.0)
            d_out_ptrs = d_out_ptr + b64 * stride_gb + h64 * stride_gh + rows * stride_gm + offs_k[None, :]
            d_out = tl.load(d_out_ptrs, mask=mask_q, other=0.0)
            lse, delta = tl.load(of_head + offs_m), tl.load(of_head + padded + offs_m)
            logits = tl.dot(k, q.T, input_precision=INPUT_PRECISION) * (scale * LOG2E)
            logits = _biased(
                logits,
                bias_ptr + b64 * stride_bb + h64 * stride_bh,
                stride_bm,
                stride_bn,
                slope,
                offs_m[None, :],
                offs_n[:, None],
                M,
                N,
                BIAS,
                HAS_SLOPES,
            )
            weights = tl.exp2(logits - lse[None, :])
            if not _spans_hold(spans_ptr + tile // BLOCK_M * (2 * NUM_ENDS), key, key + BLOCK_N, NUM_ENDS):
                lo, hi, lo2, hi2 = _ends_of(lo_ptr, hi_ptr, lo2_ptr, hi2_ptr, offs_m, mask_m, NUM_ENDS)
                seen = _seen(lo[None, :], hi[None, :], lo2[None, :], hi2[None, :], offs_n[:, None], NUM_ENDS)
                weights = tl.where(seen, weights, 0.0)
            d_weights = tl.dot(v, d_out.T, input_precision=INPUT_PRECISION)
            dropped = weights
            if HAS_DROPOUT:
                keep = _kept(seed, threshold, bh, offs_m, key, BLOCK_M, BLOCK_N).T
                dropped = tl.where(keep, weights * keep_scale, 0.0)
                d_weights = tl.where(keep, d_weights * keep_scale, 0.0)
            dv = tl.dot(dropped.to(d_out.dtype), d_out, dv, input_precision=INPUT_PRECISION)
            d_logits = weights * (d_weights - delta[None, :])
            dk = tl.dot(d_logits.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
    if HAS_SEEN:
        dk = tl.where(seen_keys[:, None] > 0, dk, 0.0)
        dv = tl.where(seen_keys[:, None] > 0, dv, 0.0)
    rows_n = offs_n.to(tl.int64)[:, None]
    inside = (offs_n[:, None] < N1) & (offs_k[None, :] < K)
    at = ((b64 * N1 + rows_n) * num_key_heads + g64) * K + offs_k[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    if HAS_SEGMENTS:
        inside = (offs_n[:, None] >= N1) & (offs_n[:, None] < N) & (offs_k[None, :] < K)
        at = ((b64 * (N - N1) + rows_n - N1) * num_key_heads + g64) * K + offs_k[None, :]
        tl.store(dk2_ptr + at, (dk * scale).to(dk2_ptr.dtype.element_ty), mask=inside)
        tl.store(dv2_ptr + at, dv.to(dv2_ptr.dtype.element_ty), mask=inside)
