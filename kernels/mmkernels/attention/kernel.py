"""Launchers of the Triton kernels of attention.

Tiles of keys that none of a tile's queries see are skipped, in forward and, for either side, in backward; where there
are few programs the keys are cut among more of them. Every gradient is written by one program: no atomics.
"""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels._launch import MOST_PROGRAMS, Launch, Table, architecture, input_precision, launch, launch_config
from mmkernels._philox import threshold
from mmkernels.attention.device import _attention_fwd_kernel
from mmkernels.attention.device_bwd import _attention_bwd_k_kernel, _attention_bwd_q_kernel
from mmkernels.attention.device_rows import _attention_rows_kernel, _attention_spans_kernel
from mmkernels.attention.problem import Problem, is_rich

# Queries of a program of the kernel that only reads the result and its gradient, and those of the largest block.
READ_ROWS, MOST_ROWS = 16, 128
# Programs are cut along the keys until there are this many for each processor.
PROGRAMS_PER_PROCESSOR = 1.5
PROCESSORS = {80: 108, 90: 132, 100: 148}
# The interpreter's, so that small tests cross the edges of splits.
INTERPRETED_PROCESSORS = 16
MAX_SPLITS = 64

# Up to which a block holds all queries, as of a Q-Former: of half precision and narrow heads, two programs and more to
# a processor.
FEW_QUERIES = 32

# A row's name ends in the largest head dimension that it serves, which is its `block_d`; a rich row serves calls with
# any extra, one for few queries those of `FEW_QUERIES`.
TABLE: Table = {
    ("fwd_64", 2, 80): Launch(128, 128, 64, 8, 3),
    ("fwd_64", 2, 90): Launch(64, 64, 64, 4, 3),
    ("fwd_64", 2, 100): Launch(128, 128, 64, 8, 3),
    ("fwd_64", 4, 80): Launch(64, 32, 64, 8, 2),
    ("fwd_64", 4, 90): Launch(64, 32, 64, 8, 2),
    ("fwd_64", 4, 100): Launch(32, 64, 64, 8, 2),
    ("fwd_128", 2, 80): Launch(64, 64, 128, 8, 3),
    ("fwd_128", 2, 90): Launch(64, 64, 128, 4, 3),
    ("fwd_128", 2, 100): Launch(128, 64, 128, 8, 3),
    ("fwd_128", 4, 80): Launch(32, 32, 128, 8, 1),
    ("fwd_128", 4, 90): Launch(64, 64, 128, 8, 2),
    ("fwd_128", 4, 100): Launch(64, 32, 128, 8, 2),
    ("fwd_256", 2, 80): Launch(32, 64, 256, 8, 2),
    ("fwd_256", 2, 90): Launch(64, 64, 256, 8, 2),
    ("fwd_256", 2, 100): Launch(64, 32, 256, 8, 2),
    ("fwd_256", 4, 80): Launch(16, 16, 256, 8, 1),
    ("fwd_256", 4, 90): Launch(32, 32, 256, 8, 2),
    ("fwd_256", 4, 100): Launch(32, 32, 256, 8, 2),
    ("fwd_few_64", 2, 80): Launch(32, 64, 64, 4, 3),
    ("fwd_few_64", 2, 90): Launch(32, 64, 64, 4, 3),
    ("fwd_few_64", 2, 100): Launch(32, 64, 64, 4, 3),
    ("fwd_rich_64", 2, 80): Launch(64, 64, 64, 8, 2),
    ("fwd_rich_64", 2, 90): Launch(128, 64, 64, 8, 3),
    ("fwd_rich_64", 2, 100): Launch(128, 64, 64, 8, 3),
    ("fwd_rich_64", 4, 80): Launch(32, 32, 64, 8, 1),
    ("fwd_rich_64", 4, 90): Launch(16, 16, 64, 8, 1),
    ("fwd_rich_64", 4, 100): Launch(32, 32, 64, 8, 1),
    ("fwd_rich_128", 2, 80): Launch(64, 64, 128, 8, 2),
    ("fwd_rich_128", 2, 90): Launch(64, 32, 128, 8, 2),
    ("fwd_rich_128", 2, 100): Launch(64, 32, 128, 8, 2),
    ("fwd_rich_128", 4, 80): Launch(32, 32, 128, 8, 1),
    ("fwd_rich_128", 4, 90): Launch(16, 32, 128, 8, 1),
    ("fwd_rich_128", 4, 100): Launch(32, 16, 128, 8, 1),
    ("fwd_rich_256", 2, 80): Launch(64, 16, 256, 8, 1),
    ("fwd_rich_256", 2, 90): Launch(64, 16, 256, 8, 1),
    ("fwd_rich_256", 2, 100): Launch(64, 16, 256, 8, 1),
    ("fwd_rich_256", 4, 80): Launch(16, 32, 256, 8, 1),
    ("fwd_rich_256", 4, 90): Launch(32, 32, 256, 8, 1),
    ("fwd_rich_256", 4, 100): Launch(32, 32, 256, 8, 1),
    ("fwd_rich_few_64", 2, 80): Launch(32, 64, 64, 4, 2),
    ("fwd_rich_few_64", 2, 90): Launch(32, 64, 64, 4, 2),
    ("fwd_rich_few_64", 2, 100): Launch(32, 64, 64, 4, 1),
    ("bwd_q_64", 2, 80): Launch(128, 32, 64, 8, 2),
    ("bwd_q_64", 2, 90): Launch(64, 64, 64, 4, 2),
    ("bwd_q_64", 2, 100): Launch(128, 32, 64, 8, 2),
    ("bwd_q_64", 4, 80): Launch(64, 32, 64, 8, 2),
    ("bwd_q_64", 4, 90): Launch(64, 32, 64, 8, 2),
    ("bwd_q_64", 4, 100): Launch(32, 32, 64, 8, 2),
    ("bwd_q_128", 2, 80): Launch(64, 64, 128, 8, 2),
    ("bwd_q_128", 2, 90): Launch(64, 64, 128, 8, 1),
    ("bwd_q_128", 2, 100): Launch(64, 32, 128, 8, 2),
    ("bwd_q_128", 4, 80): Launch(16, 16, 128, 8, 1),
    ("bwd_q_128", 4, 90): Launch(32, 32, 128, 8, 2),
    ("bwd_q_128", 4, 100): Launch(16, 32, 128, 8, 2),
    ("bwd_q_256", 2, 80): Launch(32, 64, 256, 8, 2),
    ("bwd_q_256", 2, 90): Launch(32, 64, 256, 8, 2),
    ("bwd_q_256", 2, 100): Launch(32, 64, 256, 8, 2),
    ("bwd_q_few_64", 2, 80): Launch(32, 64, 64, 4, 2),
    ("bwd_q_few_64", 2, 90): Launch(32, 64, 64, 4, 2),
    ("bwd_q_few_64", 2, 100): Launch(32, 64, 64, 4, 2),
    ("bwd_q_rich_64", 2, 80): Launch(64, 16, 64, 8, 1),
    ("bwd_q_rich_64", 2, 90): Launch(64, 64, 64, 8, 2),
    ("bwd_q_rich_64", 2, 100): Launch(128, 64, 64, 8, 2),
    ("bwd_q_rich_64", 4, 80): Launch(32, 32, 64, 8, 1),
    ("bwd_q_rich_64", 4, 90): Launch(32, 16, 64, 4, 2),
    ("bwd_q_rich_64", 4, 100): Launch(32, 16, 64, 4, 2),
    ("bwd_q_rich_128", 2, 80): Launch(64, 32, 128, 8, 2),
    ("bwd_q_rich_128", 2, 90): Launch(64, 32, 128, 8, 2),
    ("bwd_q_rich_128", 2, 100): Launch(64, 32, 128, 8, 2),
    ("bwd_q_rich_256", 2, 80): Launch(64, 16, 256, 8, 1),
    ("bwd_q_rich_256", 2, 90): Launch(32, 32, 256, 8, 1),
    ("bwd_q_rich_256", 2, 100): Launch(32, 32, 256, 8, 1),
    ("bwd_q_rich_few_64", 2, 80): Launch(32, 64, 64, 4, 2),
    ("bwd_q_rich_few_64", 2, 90): Launch(32, 64, 64, 4, 2),
    ("bwd_q_rich_few_64", 2, 100): Launch(32, 64, 64, 4, 2),
    ("bwd_k_64", 2, 80): Launch(32, 64, 64, 4, 1),
    ("bwd_k_64", 2, 90): Launch(64, 128, 64, 8, 3),
    ("bwd_k_64", 2, 100): Launch(64, 128, 64, 8, 1),
    ("bwd_k_64", 4, 80): Launch(32, 32, 64, 8, 1),
    ("bwd_k_64", 4, 90): Launch(16, 32, 64, 4, 1),
    ("bwd_k_64", 4, 100): Launch(16, 32, 64, 8, 2),
    ("bwd_k_128", 2, 80): Launch(64, 64, 128, 8, 1),
    ("bwd_k_128", 2, 90): Launch(32, 64, 128, 8, 1),
    ("bwd_k_128", 2, 100): Launch(64, 32, 128, 8, 1),
    ("bwd_k_128", 4, 80): Launch(16, 16, 128, 4, 1),
    ("bwd_k_128", 4, 90): Launch(16, 16, 128, 8, 2),
    ("bwd_k_128", 4, 100): Launch(32, 16, 128, 8, 1),
    ("bwd_k_256", 2, 80): Launch(32, 32, 256, 8, 1),
    ("bwd_k_256", 2, 90): Launch(32, 32, 256, 8, 1),
    ("bwd_k_256", 2, 100): Launch(32, 32, 256, 8, 1),
    ("bwd_k_few_64", 2, 80): Launch(32, 64, 64, 4, 1),
    ("bwd_k_few_64", 2, 90): Launch(32, 64, 64, 4, 3),
    ("bwd_k_few_64", 2, 100): Launch(32, 64, 64, 4, 3),
    ("bwd_k_rich_64", 2, 80): Launch(32, 32, 64, 4, 1),
    ("bwd_k_rich_64", 2, 90): Launch(32, 64, 64, 8, 1),
    ("bwd_k_rich_64", 2, 100): Launch(32, 64, 64, 8, 1),
    ("bwd_k_rich_64", 4, 80): Launch(32, 32, 64, 8, 1),
    ("bwd_k_rich_64", 4, 90): Launch(32, 32, 64, 8, 1),
    ("bwd_k_rich_64", 4, 100): Launch(32, 32, 64, 8, 1),
    ("bwd_k_rich_128", 2, 80): Launch(32, 32, 128, 8, 1),
    ("bwd_k_rich_128", 2, 90): Launch(16, 32, 128, 8, 2),
    ("bwd_k_rich_128", 2, 100): Launch(32, 64, 128, 8, 1),
    ("bwd_k_rich_256", 2, 80): Launch(32, 16, 256, 8, 1),
    ("bwd_k_rich_256", 2, 90): Launch(16, 16, 256, 8, 1),
    ("bwd_k_rich_256", 2, 100): Launch(32, 16, 256, 8, 2),
    ("bwd_k_rich_few_64", 2, 80): Launch(32, 32, 64, 4, 1),
    ("bwd_k_rich_few_64", 2, 90): Launch(32, 32, 64, 4, 1),
    ("bwd_k_rich_few_64", 2, 100): Launch(32, 32, 64, 4, 1),
}


def attention_fwd(problem: Problem) -> tuple[Tensor, Tensor]:
    """The result `[B, Lq, H, K]`, and the log-sum-exps `[B, H, Lq]`, float32."""
    config = _config_of("fwd", problem)
    arguments, strides, flags = _arguments(problem, config)
    grid, per_split, out = _of_queries(problem, config, arguments[0])
    splits, batch, num_queries, num_heads, _ = out.shape
    lse = out.new_empty(splits, batch, num_heads, num_queries, dtype=torch.float32)
    if out.numel():
        numbers = (*strides, *_sizes(problem), per_split, *_numbers(problem))
        _launch(_attention_fwd_kernel, grid, *arguments, out, lse, *numbers, **flags)
    return _combined(out, lse, problem.q.dtype)


def attention_bwd(
    problem: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q and of keys and values of two segments, those that `needs` asks for; none of a bias."""
    d_out = _operand(d_out)
    rows = (d_out, _rows(problem, out, lse, d_out, d_lse))
    dq = _query_gradient(problem, rows) if needs[0] else None
    dkv = _key_gradients(problem, rows) if any(needs[1:5]) else [None] * 4
    return [dq, *dkv, None]


def _launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **flags: Any) -> None:
    """Over blocks, heads of all images, splits."""
    blocks, heads, splits = grid
    is_swapped = heads > MOST_PROGRAMS[1]
    grid = (heads, blocks, splits) if is_swapped else grid
    launch(kernel, grid, *arguments, **flags, HEADS_FIRST=is_swapped)


def _config_of(kernel: str, problem: Problem) -> Launch:
    """Of the "fwd", the "bwd_q" or the "bwd_k" kernel."""
    q = problem.q
    size = 64 if q.shape[3] <= 64 else 128 if q.shape[3] <= 128 else 256
    is_few = q.shape[1] <= FEW_QUERIES and size == 64 and q.element_size() == 2
    kind = ("_rich" if is_rich(problem) else "") + ("_few" if is_few else "")
    return launch_config(TABLE, f"{kernel}{kind}_{size}", q)


def _split_keys(num_programs: int, num_keys: int, block_n: int, x: Tensor) -> int:
    """Keys of a split, whole tiles: few programs alone would leave processors idle."""
    processors = PROCESSORS[architecture(x.device)] if x.is_cuda else INTERPRETED_PROCESSORS
    wanted = int(PROGRAMS_PER_PROCESSOR * processors) // max(num_programs, 1)
    tiles = max(triton.cdiv(num_keys, block_n), 1)
    return int(triton.cdiv(tiles, min(max(wanted, 1), MAX_SPLITS, tiles))) * block_n


def _query_gradient(problem: Problem, rows: tuple[Tensor, Tensor]) -> Tensor:
    config = _config_of("bwd_q", problem)
    arguments, strides, flags = _arguments(problem, config)
    grid, per_split, dq = _of_queries(problem, config, arguments[0])
    if dq.numel():
        numbers = (*strides, *rows[0].stride()[:3], rows[1].shape[3], *_sizes(problem), per_split, *_numbers(problem))
        _launch(_attention_bwd_q_kernel, grid, *arguments, *rows, dq, *numbers, **flags)
    return dq[0] if len(dq) == 1 else dq.sum(0)


def _of_queries(problem: Problem, config: Launch, q: Tensor) -> tuple[tuple[int, int, int], int, Tensor]:
    """The programs of a kernel over blocks of queries, the keys of a split, and room for its results
    `[splits, B, Lq, H, K]`, in float32 where they are still to be put together."""
    batch, num_queries, num_heads, width = problem.q.shape
    blocks = triton.cdiv(num_queries, config.block_m)
    per_split = _split_keys(blocks * batch * num_heads, problem.num_keys, config.block_n, q)
    splits = max(triton.cdiv(problem.num_keys, per_split), 1)
    kind = q.dtype if splits == 1 else torch.float32
    room = q.new_empty(splits, batch, num_queries, num_heads, width, dtype=kind)
    return (blocks, batch * num_heads, splits), per_split, room


def _key_gradients(problem: Problem, rows: tuple[Tensor, Tensor]) -> list[Tensor | None]:
    """dk, dv, dk2, dv2."""
    config = _config_of("bwd_k", problem)
    arguments, strides, flags = _arguments(problem, config)
    q, batch = arguments[0], problem.q.shape[0]
    num_key_heads = problem.segments[0][0].shape[2]
    grads = [torch.empty(x.shape, dtype=q.dtype, device=q.device) for s in problem.segments for x in s]
    blocks = triton.cdiv(problem.num_keys, config.block_n)
    if blocks and batch:
        spans = _spans(problem, config) if problem.ends else None
        stride = 0 if spans is None or spans.shape[0] == 1 else spans.stride(0)
        pointers = (*grads, *(q,) * (4 - len(grads)))
        numbers = (*strides, *rows[0].stride()[:3], rows[1].shape[3], stride, *_sizes(problem), *_numbers(problem))
        grid = (blocks, batch * num_key_heads, 1)
        _launch(
            _attention_bwd_k_kernel,
            grid,
            *arguments,
            *rows,
            q if spans is None else spans,
            *pointers,
            *numbers,
            **flags,
        )
    return [*grads, *(None,) * (4 - len(grads))]


def _spans(problem: Problem, config: Launch) -> Tensor:
    """Of each block of queries the keys that some see, and those that all do, int32 `[b, blocks, 4 or 8]`."""
    num_queries, num_ends = problem.q.shape[1], len(problem.ends)
    lo = problem.ends[0]
    ends = [x.contiguous() for x in problem.ends]
    spans = lo.new_empty(len(lo), triton.cdiv(num_queries, config.block_m), 2 * num_ends)
    if spans.numel():
        stride = 0 if len(lo) == 1 else num_queries
        launch(
            _attention_spans_kernel,
            (len(lo), spans.shape[1]),
            *ends,
            *(lo,) * (4 - num_ends),
            spans,
            stride,
            num_queries,
            NUM_ENDS=num_ends,
            BLOCK_M=config.block_m,
            num_warps=1,
        )
    return spans


def _rows(problem: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """What both backward kernels read of a query, float32 `[B, H, 2, Lq]`, whole blocks of queries."""
    batch, num_queries, num_heads, width = problem.q.shape
    padded = triton.cdiv(num_queries, MOST_ROWS) * MOST_ROWS
    rows = torch.empty(batch, num_heads, 2, padded, dtype=torch.float32, device=out.device)
    if rows.numel():
        _launch(
            _attention_rows_kernel,
            (padded // READ_ROWS, batch * num_heads, 1),
            _operand(out).contiguous(),
            d_out,
            lse.contiguous(),
            rows if d_lse is None else d_lse.contiguous(),
            rows,
            *d_out.stride()[:3],
            num_queries,
            width,
            num_heads,
            padded,
            HAS_DLSE=d_lse is not None,
            BLOCK_M=READ_ROWS,
            BLOCK_K=_block_k(problem),
        )
    return rows


def _combined(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The splits' results `[S, B, Lq, H, K]` by their log-sum-exps `[S, B, H, Lq]`."""
    if out.shape[0] == 1:
        return out[0].to(dtype), lse[0]
    whole = lse.logsumexp(0)
    weights = (lse - whole.masked_fill(whole == -torch.inf, 0)).exp().transpose(2, 3)
    return (out * weights[..., None]).sum(0).to(dtype), whole


def _operand(x: Tensor) -> Tensor:
    """With unit stride along K. The interpreter would multiply bfloat16 as raw bits: there it is widened."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        x = x.float()
    return x if x.stride(3) == 1 else x.contiguous()


def _block_k(problem: Problem) -> int:
    return max(triton.next_power_of_2(problem.q.shape[3]), 16)


def _arguments(problem: Problem, config: Launch) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """Pointers that all kernels begin with, their strides, and the flags."""
    q = _operand(problem.q)
    segments = [_operand(x) for segment in problem.segments for x in segment]
    segments += [q] * (4 - len(segments))
    ends = [x.contiguous() for x in problem.ends]
    keys, bias, slopes = problem.keys, problem.bias, problem.alibi_slopes
    if keys is not None and is_rich(problem):
        # a matrix of one row, which costs a rich kernel no registers
        keys, bias = None, keys[:, None, None]
    kind = "none"
    of_bias = [0] * 4
    if bias is not None:
        kind = "bool" if bias.dtype == torch.bool else "float"
        of_bias = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
        bias = bias.view(torch.uint8) if kind == "bool" else _widened_bias(bias)
    of_ends = 0 if not ends or ends[0].shape[0] == 1 else ends[0].shape[1]
    of_slopes = 0 if slopes is None or slopes.shape[0] == 1 else slopes.shape[1]
    of_seen = 0 if keys is None or keys.shape[0] == 1 else keys.shape[1]
    pointers = (
        q,
        *segments,
        *ends,
        *(q,) * (4 - len(ends)),
        q if bias is None else bias,
        q if slopes is None else slopes.contiguous(),
        q if problem.seed is None else problem.seed,
        q if keys is None else keys.contiguous().view(torch.uint8),
    )
    of_keys = (stride for x in segments for stride in x.stride()[:3])
    strides = (*q.stride()[:3], *of_keys, of_ends, *of_bias, of_slopes, of_seen)
    flags = {
        "NUM_ENDS": len(ends),
        "BIAS": kind,
        "HAS_SLOPES": slopes is not None,
        "HAS_DROPOUT": problem.seed is not None,
        "HAS_SEGMENTS": len(problem.segments) == 2,
        "HAS_SEEN": keys is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": _block_k(problem),
        "INPUT_PRECISION": input_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return pointers, strides, flags


def _widened_bias(bias: Tensor) -> Tensor:
    return bias.float() if bias.dtype == torch.bfloat16 and not bias.is_cuda else bias


def _sizes(problem: Problem) -> tuple[int, ...]:
    first = problem.segments[0][0].shape[1]
    num_heads, width = problem.q.shape[2:]
    return problem.q.shape[1], problem.num_keys, first, width, num_heads, problem.num_groups


def _numbers(problem: Problem) -> tuple[float, int, float]:
    return problem.scale, threshold(problem.dropout_p), 1 / (1 - problem.dropout_p)
