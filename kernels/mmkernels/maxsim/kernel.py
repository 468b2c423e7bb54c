"""MaxSim in Triton: products are made tile by tile and never stored; all that is kept is where the best ones are."""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
from torch import Tensor

from mmkernels._launch import Launch, Table, constant_launch, launch, launch_config, tile_flags
from mmkernels._tl import PITCH, operand
from mmkernels.maxsim.blockwise import place_dtype
from mmkernels.maxsim.device import _maxsim_bwd_d_kernel, _maxsim_bwd_q_kernel, _maxsim_fwd_kernel

# dL/dscores are stored in the operands' dtype, the largest moved here: float16 then keeps 28 binades below.
GRAD_CEILING = 2.0**14
# Programs over the queries' tokens that keep every processor busy; fewer are cut along the documents.
MIN_PROGRAMS, MAX_SPLITS = 1056, 16

TABLE: Table = {
    # tokens up to so wide stay on chip while the document's pass by
    **{("fwd_64", 2, arch): Launch(128, 64, 64, 4, 3) for arch in (80, 90, 100)},
    **{("fwd_128", 2, arch): Launch(128, 64, 128, 4, 3) for arch in (80, 90, 100)},
    ("fwd_256", 2, 80): Launch(64, 64, 256, 4, 2),
    ("fwd_256", 2, 90): Launch(128, 64, 256, 8, 3),
    ("fwd_256", 2, 100): Launch(128, 64, 256, 8, 3),
    **{("fwd_wide", 2, arch): Launch(128, 64, 64, 8, 3) for arch in (80, 90, 100)},
    **{("fwd_wide", 4, arch): Launch(128, 64, 16, 8, 3) for arch in (80, 90)},
    ("fwd_wide", 4, 100): Launch(64, 64, 16, 8, 3),
    # a tile of dd is block_d by block_n
    **{("bwd_d_64", 2, arch): Launch(64, 64, 64, 4, 3) for arch in (80, 90, 100)},
    **{("bwd_d", 2, arch): Launch(64, 128, 128, 8, 3) for arch in (80, 90, 100)},
    # of 64 by 64, triton makes exact products TF32 on sm_100
    **{("bwd_d", 4, arch): Launch(16, 64, 32, 4, 2) for arch in (80, 90, 100)},
}
BWD_Q = Launch(16, 1, 64, 4, 1)


def maxsim_fwd(q: Tensor, d: Tensor, d_mask: Tensor | None, with_best: bool) -> tuple[Tensor, Tensor | None]:
    """As the blockwise path's."""
    (num_docs, length, width), num_tokens = d.shape, len(q)
    size = next((size for size in (64, 128, 256) if width <= size and q.element_size() == 2), None)
    config = launch_config(TABLE, f"fwd_{size or 'wide'}", q)
    q, flat = operand(q, config.block_d), operand(d.flatten(0, 1), config.block_d)
    found = q.new_empty(num_docs, num_tokens, dtype=torch.float32)
    best = q.new_empty(num_docs, num_tokens, dtype=place_dtype(length)) if with_best else None
    if found.numel():
        launch(
            _maxsim_fwd_kernel,
            (triton.cdiv(num_tokens, config.block_m) * num_docs,),
            q,
            flat,
            q if d_mask is None else d_mask.contiguous().view(torch.uint8),
            found,
            found if best is None else best,
            q.stride(0),
            flat.stride(0),
            num_tokens,
            length,
            q.shape[1],
            HAS_MASK=d_mask is not None,
            HAS_BEST=with_best,
            IS_WHOLE=(size is not None or not q.is_cuda) and q.shape[1] == config.block_d,
            **tile_flags(config),
        )
    return found, best


def maxsim_bwd(
    q: Tensor, d: Tensor, best: Tensor, grad: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As the blockwise path's."""
    if not best.numel():
        dq, dd = (x.new_zeros(x.shape) if needed else None for x, needed in zip((q, d), needs, strict=True))
        return dq, dd
    return _of_queries(q, d, best, grad) if needs[0] else None, _of_documents(q, d, best, grad) if needs[1] else None


def _of_queries(q: Tensor, d: Tensor, best: Tensor, grad: Tensor) -> Tensor:
    (num_tokens, width), num_docs = q.shape, len(d)
    config = constant_launch(BWD_Q, q)
    flat = operand(d.flatten(0, 1), PITCH)
    blocks, blocks_d = triton.cdiv(num_tokens, config.block_m), triton.cdiv(width, config.block_d)
    splits = min(max(MIN_PROGRAMS // (blocks * blocks_d), 1), MAX_SPLITS, num_docs)
    per_split = triton.cdiv(num_docs, splits)
    parts = grad.new_empty(splits, num_tokens, width)
    sizes = (num_tokens, d.shape[1], num_docs, grad.shape[1], num_tokens // grad.shape[1], width, per_split)
    blocks_of = {"BLOCK_M": config.block_m, "BLOCK_D": config.block_d, "num_warps": config.num_warps}
    grid = (blocks, blocks_d, splits)
    launch(_maxsim_bwd_q_kernel, grid, flat, best, grad, parts, flat.stride(0), *sizes, **blocks_of)
    return parts[0] if splits == 1 else parts.sum(0)


def _of_documents(q: Tensor, d: Tensor, best: Tensor, grad: Tensor) -> Tensor:
    (num_docs, length, width), num_tokens = d.shape, len(q)
    config = launch_config(TABLE, "bwd_d_64" if width <= 64 and q.element_size() == 2 else "bwd_d", q)
    q = operand(q, config.block_d)
    unit = grad.abs().amax().clamp_min(torch.finfo(grad.dtype).tiny) / GRAD_CEILING
    dd = torch.empty(d.shape, dtype=d.dtype if d.is_cuda else grad.dtype, device=d.device)
    launch(
        _maxsim_bwd_d_kernel,
        (triton.cdiv(length, config.block_n) * num_docs, triton.cdiv(width, config.block_d)),
        q,
        best,
        grad,
        unit,
        dd,
        q.stride(0),
        num_tokens,
        length,
        grad.shape[1],
        num_tokens // grad.shape[1],
        width,
        **tile_flags(config),
    )
    return dd
