"""Small shapes, every product of tokens stored: the reference on widened features, on a CPU or one native pass."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels import native
from mmkernels._autograd import is_transforming
from mmkernels._checks import in_range
from mmkernels._cost import Composition
from mmkernels._device import may_compose, runs_triton
from mmkernels._gemm import factor, low_like, matmul, matmul_nt
from mmkernels._numerics import widen
from mmkernels.token_contrastive.reference import token_contrastive_loss_ref

# Products that stay in a CPU's cache are cheaper kept than recomputed.
EAGER_PRODUCTS = 1 << 18
# Up to 16 MiB of them, where one native pass finds the best, the loss and the gradient.
STORED_PRODUCTS = 1 << 22
# The reference on a GPU, of products of tokens with features `[N, D]`: with labels, beside the kernels without options.
# Late interaction saves more of the host's time; the bytes are its, with masks.
ON_GPU = Composition(
    most_logits=1 << 22, host_us=300, launches=71, bytes_per_logit=100, products=3,
    kernels_host_us=700, kernels_launches=67,
)  # fmt: skip


def is_faster(tokens: Tensor, b: Tensor) -> bool:
    """A pure function of shapes and device type."""
    if may_compose(tokens):
        return ON_GPU.is_faster(_num_products(tokens, b), tokens.shape[2])
    return _fits(tokens, b, EAGER_PRODUCTS)


def is_stored(tokens: Tensor, b: Tensor, positives: Tensor | None) -> bool:
    """Whether `StoredTokens` serves the symmetric mean without masks, labels or smoothing: of features `[M, D]`, as
    many as rows, and positives on the diagonal."""
    if is_compiling() or is_transforming() or not native.AVAILABLE or tokens.dtype == torch.float64:
        return False
    if b.ndim != 2 or len(tokens) != len(b) or not _fits(tokens, b, STORED_PRODUCTS):
        return False
    return positives is None or torch.equal(positives, torch.arange(len(b)))


def _fits(tokens: Tensor, b: Tensor, most: int) -> bool:
    return not (tokens.is_cuda or runs_triton(tokens)) and 0 < _num_products(tokens, b) < most


def _num_products(tokens: Tensor, b: Tensor) -> int:
    return tokens.shape[0] * tokens.shape[1] * b[..., 0].numel()


def token_contrastive_loss_eager(
    tokens: Tensor, b: Tensor, scale: Tensor, *, positives: Tensor | None, **options: Any
) -> Tensor:
    """`options` are the other arguments of `token_contrastive_loss`."""
    is_right = None
    if positives is not None and tokens.is_cuda:
        positives, is_right = in_range(positives, len(b))
    loss = token_contrastive_loss_ref(widen(tokens), widen(b), scale, positives=positives, **options)
    if is_right is None:
        return loss
    return loss * (is_right if loss.ndim else is_right.mean())


class StoredTokens(torch.autograd.Function):
    """Symmetric InfoNCE of `[M, Q, D]` with `[M, D]` features on a CPU; the products' gradient, zero but at each pair's
    best token, takes their place in the forward."""

    @staticmethod
    def forward(ctx, tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        given = (tokens, b)
        flat, b = factor(tokens).flatten(0, 1), factor(b)
        products = matmul_nt(flat, b)  # [M * Q, M]
        needed = any(ctx.needs_input_grad)
        sums = torch.ops.mmkernels.token_nce_tile(products.view(*tokens.shape[:2], -1), scale.item(), needed)
        ctx.save_for_backward(products, flat, b, scale, sums, *given)
        return sums[0].to(products.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, flat, b, scale, sums, *given = ctx.saved_tensors
        inputs = (*given, scale)
        if torch.is_grad_enabled():  # a second derivative is asked for, which the reference has
            wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            loss = token_contrastive_loss_ref(widen(given[0]), widen(given[1]), scale).to(upstream.dtype)
            found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        needs_tokens, needs_b, needs_scale = ctx.needs_input_grad
        grad = low_like(grad, b)
        grads = (
            matmul(grad, b).view(given[0].shape) if needs_tokens else None,
            matmul(grad.T, flat) if needs_b else None,
            sums[1].view(scale.shape) if needs_scale else None,
        )
        if upstream.item() != 1:
            grads = (None if dx is None else dx * upstream for dx in grads)
        return tuple(None if dx is None else dx.to(x.dtype) for dx, x in zip(grads, inputs, strict=True))
