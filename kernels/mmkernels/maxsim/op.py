"""Differentiable MaxSim, registered with torch."""

import torch
from torch import Tensor

from mmkernels._autograd import has_no_derivative, reverse_only
from mmkernels._checks import accumulator, autocast_operands, check_beside, check_dtype, require
from mmkernels._device import Kernels, runs_triton
from mmkernels.maxsim import blockwise, eager

kernel = Kernels("mmkernels.maxsim")

OP = "maxsim"


def maxsim(q: Tensor, d: Tensor, *, q_mask: Tensor | None = None, d_mask: Tensor | None = None) -> Tensor:
    """`S_bn = sum_i max_t <q_bi, d_nt>`: every query's tokens against their best of every document, late interaction as
    ColBERT, ColPali and FILIP have it; no product is ever stored.

    For a gradient the places of the best tokens are kept, 2 bytes a document and token of a query; of equal products
    the first takes the gradient. A rerun gives the same bits. Under autocast the tokens are cast as a matrix product
    would cast them.

    Args:
        q: the queries' tokens `[B, Lq, D]`, float32, float16, bfloat16 or float64, any strides.
        d: the documents' `[N, Ld, D]`, the dtype and device of `q`.
        q_mask: bool `[B, Lq]`, True where a token counts; None = all.
        d_mask: bool `[N, Ld]`, True where a token counts; None = all. A document of which none does has S = 0, without
            a gradient.

    Returns:
        S `[B, N]`, float32, accumulated in float32 (float64 for float64). A mean over the query's tokens is
        `S / q_mask.sum(1)[:, None]`. A token of a document that is not a number is taken for none.

    Raises:
        ValueError: a wrong shape, dtype, device or mask.

    Reference: `maxsim_ref`. Papers: arXiv:2004.12832 (ColBERT), arXiv:2407.01449 (ColPali), arXiv:2111.07783 (FILIP).
    """
    _check(q, d, q_mask, d_mask)
    q, d = autocast_operands(q, d)
    require(OP, q.dtype == d.dtype, "d must have the dtype of q, {}, got {}", q.dtype, d.dtype)
    if q_mask is not None:  # whatever padding holds, not a number too, goes nowhere
        q = q.masked_fill(~q_mask[:, :, None], 0)
    if eager.is_faster(q, d):
        with torch.autocast(q.device.type, enabled=False):
            return eager.maxsim_eager(q, d, q_mask=q_mask, d_mask=d_mask)
    reverse_only(OP, "mmkernels.maxsim_ref", q=q, d=d)
    with_best = torch.is_grad_enabled() and (q.requires_grad or d.requires_grad)
    return _maxsim_fwd(q, d, q_mask, d_mask, with_best)[0]


@torch.library.custom_op("mmkernels::maxsim_fwd", mutates_args=())
def _maxsim_fwd(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, with_best: bool
) -> tuple[Tensor, Tensor]:
    (batch, length, _), num_docs = q.shape, len(d)
    path = kernel if runs_triton(q) else blockwise
    with torch.autocast(q.device.type, enabled=False):
        found, best = path.maxsim_fwd(q.flatten(0, 1), d, d_mask, with_best)
    if d_mask is not None:
        found.masked_fill_(~d_mask.any(1)[:, None], 0)
    found = found.view(num_docs, batch, length)
    if q_mask is not None:
        found.masked_fill_(~q_mask, 0)
        if best is not None:
            best.view(num_docs, batch, length).masked_fill_(~q_mask, -1)
    kept = q.new_empty(0, dtype=torch.int16) if best is None else best
    return found.sum(2).T.contiguous(), kept


@_maxsim_fwd.register_fake
def _(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, with_best: bool) -> tuple[Tensor, Tensor]:
    (batch, length, _), num_docs = q.shape, d.shape[0]
    dtype = blockwise.place_dtype(d.shape[1]) if with_best else torch.int16
    best = q.new_empty((num_docs, batch * length) if with_best else 0, dtype=dtype)
    return q.new_empty(batch, num_docs, dtype=accumulator(q.dtype)), best


@torch.library.custom_op("mmkernels::maxsim_bwd", mutates_args=())
def _maxsim_bwd(q: Tensor, d: Tensor, best: Tensor, grad: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    path = kernel if runs_triton(q) else blockwise
    with torch.autocast(q.device.type, enabled=False):
        results = path.maxsim_bwd(q.flatten(0, 1), d, best, grad.T.contiguous(), (needs[0], needs[1]))
    return tuple(
        like.new_empty(0) if dx is None else dx.to(like.dtype).view(like.shape)
        for dx, like in zip(results, (q, d), strict=True)
    )  # pyright: ignore[reportReturnType]


@_maxsim_bwd.register_fake
def _(q: Tensor, d: Tensor, best: Tensor, grad: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((q, d), needs))  # pyright: ignore[reportReturnType]


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor, _best: None):
    q, d, q_mask, d_mask, best = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if not best.numel():  # a transform hid that there would be a gradient
        best = _maxsim_fwd(q, d, q_mask, d_mask, True)[1]
    results = _maxsim_bwd(q, d, best, grad, needs)
    return *(dx if needed else None for dx, needed in zip(results, needs)), None, None, None


_maxsim_fwd.register_autograd(_backward, setup_context=_setup_context)
_maxsim_bwd.register_autograd(has_no_derivative(OP, "mmkernels.maxsim_ref"))


def _check(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> None:
    shape = list(q.shape)
    require(OP, q.ndim == 3 and 0 not in shape[1:], "q must be [B, Lq, D], Lq and D at least one, got shape {}", shape)
    check_dtype(OP, "q", q)
    is_like = d.ndim == 3 and d.shape[2] == shape[2] and d.shape[1] > 0
    require(OP, is_like, "d must be [N, Ld, {}], as wide as q, Ld at least one, got shape {}", shape[2], list(d.shape))
    check_dtype(OP, "d", d)
    check_beside(OP, "d", d, "q", q)
    for name, mask, like in (("q_mask", q_mask, q), ("d_mask", d_mask, d)):
        if mask is not None:
            of = list(like.shape[:2])
            is_mask = mask.dtype == torch.bool and list(mask.shape) == of
            require(OP, is_mask, "{} must be bool {}, got {} {}", name, of, mask.dtype, list(mask.shape))
            check_beside(OP, name, mask, "q", q)
