"""Masks of intervals in the forms of the libraries that take some: endpoints by query (cuDNN frontend), bounds by key
(FlashMask). What is made of a mask is made beforehand, and not timed."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.peers import load
from bench.spec import Shape
from mmkernels.masks import Intervals, Mask

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def endpoints(mask: Intervals | None, shape: Shape, device: torch.device) -> Tensor:
    """int32 `[1, 2 n + 1, B * Lq]` of n intervals a query, which do not decrease: keys below the first, then from the
    second to below the third, and so on."""
    num_keys, size = shape["Lk"], (shape["B"], shape["Lq"])
    if mask is None:
        return torch.full((1, 1, shape["B"] * shape["Lq"]), num_keys, dtype=torch.int32, device=device)
    pairs = [[x.expand(size).int() for x in pair] for pair in mask.pairs]
    # an empty interval lies behind the last key, and in order is by where they begin
    pairs = [[torch.where(lo < hi, x, num_keys) for x in (lo, hi)] for lo, hi in pairs]
    if len(pairs) == 2:
        swap = pairs[1][0] < pairs[0][0]
        pairs = [[torch.where(swap, y, x) for x, y in zip(*order)] for order in (pairs, pairs[::-1])]
    ends = [torch.zeros(size, dtype=torch.int32, device=device)]
    for x in (x for pair in pairs for x in pair):
        ends.append(torch.maximum(x, ends[-1]))
    return torch.stack(ends).flatten(1)[None].contiguous()


def bounds(dense: Tensor | None, shape: Shape, device: torch.device) -> tuple[Tensor | None, bool]:
    """FlashMask's int32 `[B or 1, 1, Lk, 1 or 2]`, and whether the mask is causal besides: from which query on a key is
    not seen and, where it is not causal, from which one on it is.

    Raises:
        ValueError: queries that see a key do not lie together.
    """
    if dense is None:
        return None, False
    seen = dense[:, 0].to(torch.int8)  # [B or 1, Lq, Lk]
    counts = seen.sum(1, dtype=torch.int32)
    first = torch.where(counts > 0, seen.argmax(1).int(), 0)
    last = torch.where(counts > 0, shape["Lq"] - seen.flip(1).argmax(1).int(), 0)
    if not torch.equal(last - first, counts):
        raise ValueError("flashmask: mask must show each key to queries that lie together, got one with a gap")
    place = torch.arange(shape["Lk"], device=device, dtype=torch.int32)
    if shape["Lq"] == shape["Lk"] and torch.equal(first, place.expand_as(first)):
        return last[:, None, :, None].contiguous(), True
    return torch.stack([last, first], -1)[:, None].contiguous(), False


def cudnn(mask: Mask | None, shape: Shape, device: torch.device) -> Call:
    """cuDNN frontend's attention by a plan of endpoints, made of the first call's tensors."""
    library = load("cudnn")

    @cache
    def plan(*tensors: Tensor) -> Any:
        ends = endpoints(mask if isinstance(mask, Intervals) else None, shape, device)
        return library.create_mask_plan(ends, *tensors, build_backward=True)

    return lambda q, k, v: library.flex_attn_func(q, k, v, mask_plan=plan(q, k, v))


def flashmask(mask: Mask | None, shape: Shape, device: torch.device) -> Call:
    """Paddle's FlashMask, whose tensors are torch's in place; its bounds are found in the first call."""
    paddle = load("flashmask")

    @cache
    def form() -> tuple[Any, bool]:
        rows, is_causal = bounds(None if mask is None else mask.to_dense(), shape, device)
        return None if rows is None else paddle.utils.dlpack.from_dlpack(rows), is_causal

    def attend(q: Any, k: Any, v: Any) -> Any:
        rows, is_causal = form()
        return paddle.nn.functional.flashmask_attention(q, k, v, startend_row_indices=rows, causal=is_causal)

    return lambda q, k, v: _Paddle.apply(paddle, attend, q, k, v)


class _Paddle(torch.autograd.Function):
    """A call of Paddle's, and its gradients by Paddle, in torch's graph."""

    @staticmethod
    def forward(ctx: Any, paddle: Any, call: Callable[..., Any], *tensors: Tensor) -> Tensor:
        theirs = [paddle.utils.dlpack.from_dlpack(x.detach()) for x in tensors]
        for x, of_ours in zip(theirs, tensors, strict=True):
            x.stop_gradient = not of_ours.requires_grad
        out = call(*theirs)
        ctx.paddle, ctx.theirs, ctx.out = paddle, theirs, out
        return torch.from_dlpack(out.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream = ctx.paddle.utils.dlpack.from_dlpack(grads[0].contiguous())
        found = ctx.paddle.grad([ctx.out], ctx.theirs, grad_outputs=[upstream], retain_graph=True)
        return (None, None, *(torch.from_dlpack(x) for x in found))
