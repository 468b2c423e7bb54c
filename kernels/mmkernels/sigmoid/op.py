"""The sigmoid loss, registered with torch: gradients are made in forward, while the logits are there."""

from itertools import zip_longest

import torch
from torch import Tensor

from mmkernels._autograd import has_no_derivative, reverse_only
from mmkernels._checks import (
    accumulator,
    autocast_operands,
    check_beside,
    check_dtype,
    check_index,
    require,
    scalar_tensor,
)
from mmkernels._device import Kernels, runs_triton
from mmkernels.sigmoid import blockwise, eager

kernel = Kernels("mmkernels.sigmoid")

REDUCTIONS = ("none", "sum", "mean")


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`sum_j softplus(-z_ij x_ij)` of each row i, `x = logit_scale * a b^T + logit_bias`, z = 1 at positives,
    else -1.

    The logits are never stored. Where a gradient is wanted of a mean or a sum, it is made in forward (three
    products in all; backward only scales it): evaluate under `torch.no_grad()`. Of `reduction="none"`,
    backward computes the logits again (four products). Unit norm is not required. Under autocast the features
    are cast as a matrix product would cast them.

    Args:
        a: features `[M, D]`, float32, float16, bfloat16 or float64, any strides.
        b: features `[N, D]`, the dtype and device of `a`.
        logit_scale: the multiplier itself (already exponentiated): a finite float, or a tensor of one
            element, whose gradient comes back in its shape and dtype. A tensor on a GPU is not checked: that
            would wait for the device.
        logit_bias: likewise; SigLIP begins with -10 (and a scale of 10).
        labels: int64 `[M]` and `[N]`: equal labels are positives (a data-parallel rank's place among gathered
            columns, several captions an image). None = the diagonal, M = N.
        reduction: "none", "sum", or "mean": the sum over M, the number of rows and not of pairs.

    Returns:
        The loss, a scalar, or `[M]` for "none": float32, its rows summed in float32 and those in float64
        (float64 for float64). An empty batch gives 0.

    Raises:
        ValueError: a wrong shape, dtype, device, scale, bias or option.

    Reference: `sigmoid_loss_ref`. Paper: arXiv:2303.15343.
    """
    require(
        "sigmoid_loss", reduction in REDUCTIONS, "reduction must be one of {}, got {}", ", ".join(REDUCTIONS), reduction
    )
    a, b, scale, bias = checked_operands(a, b, logit_scale, logit_bias, labels)
    if eager.is_stored(a, b, reduction):
        return eager.StoredLoss.apply(a, b, scale, bias, labels, reduction)  # pyright: ignore[reportReturnType]
    if eager.is_faster(a, b):
        with torch.autocast(a.device.type, enabled=False):
            return eager.sigmoid_loss_eager(a, b, scale, bias, labels, reduction)
    reverse_only("sigmoid_loss", "mmkernels.sigmoid_loss_ref", a=a, b=b, logit_scale=scale, logit_bias=bias)
    total = reduction != "none"
    needs = [total and torch.is_grad_enabled() and x.requires_grad for x in (a, b, scale, bias)]
    return _sigmoid_fwd(a, b, scale, bias, *(labels or (None, None)), reduction, needs)[0]


def checked_operands(
    a: Tensor, b: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor, labels: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checked, and cast for autocast; scale and bias as tensors."""
    _check(a, b, labels)
    scale = scalar_tensor("sigmoid_loss", "logit_scale", logit_scale, "a", a)
    bias = scalar_tensor("sigmoid_loss", "logit_bias", logit_bias, "a", a)
    a, b = autocast_operands(a, b)
    require("sigmoid_loss", a.dtype == b.dtype, "b must have the dtype of a, {}, got {}", a.dtype, b.dtype)
    return a, b, scale, bias


@torch.library.custom_op("mmkernels::sigmoid_fwd", mutates_args=())
def _sigmoid_fwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_label: Tensor | None,
    col_label: Tensor | None,
    reduction: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; what is made of the gradients of a and b, as the path leaves it; and sums over the rows, of the losses
    and, where they are needed, of the gradients of scale and bias."""
    rows, da, db, totals = _run(a, b, scale, bias, row_label, col_label, None, needs)
    loss = (rows if reduction == "none" else totals)[0]
    if reduction == "mean":
        loss = loss / max(len(a), 1)
    # never one of the totals itself
    loss = loss.to(accumulator(a.dtype), copy=True)
    return loss, *(rows.new_empty(0) if dx is None else dx for dx in (da, db)), totals  # pyright: ignore[reportReturnType]


@_sigmoid_fwd.register_fake
def _(a, b, scale, bias, row_label, col_label, reduction, needs):
    dtype = accumulator(a.dtype)
    da, db = (
        a.new_empty(x.shape, dtype=dtype) if needed else a.new_empty(0, dtype=torch.float64)
        for x, needed in zip((a, b), needs)
    )
    totals = a.new_empty(3 if any(needs[2:]) else 1, dtype=torch.float64)
    return a.new_empty(a.shape[:1] if reduction == "none" else (), dtype=dtype), da, db, totals


@torch.library.custom_op("mmkernels::sigmoid_made", mutates_args=())
def _sigmoid_made(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    made: list[Tensor],
    d_loss: Tensor,
    share: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that forward made, times a share of that of a loss that is one number."""
    inputs = (a, b, scale, bias)
    if runs_triton(a):
        grads = kernel.sigmoid_bwd(inputs, made, d_loss, share, needs)
    else:
        # rounded only after the factor: float16's loss scale is in it
        parts, factor = (*made[:2], *made[2][1:].unbind()), d_loss * share
        grads = [
            (dx * factor).to(x.dtype).view(x.shape) if needed else None
            for x, dx, needed in zip_longest(inputs, parts, needs, fillvalue=made[2])
        ]
    return tuple(x.new_empty(0) if dx is None else dx for x, dx in zip(inputs, grads))  # pyright: ignore[reportReturnType]


@torch.library.custom_op("mmkernels::sigmoid_bwd", mutates_args=())
def _sigmoid_bwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_label: Tensor | None,
    col_label: Tensor | None,
    d_loss: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coef = d_loss.to(accumulator(a.dtype))
    # the kernel stores gradients of coefficients up to 1; tiny ones would leave float16's range
    largest = coef.abs().amax().clamp_min(torch.finfo(coef.dtype).tiny) if len(coef) else coef.new_ones(())
    _, *made = _run(a, b, scale, bias, row_label, col_label, coef / largest, needs)
    filled = [a.new_empty(0) if dx is None else dx for dx in made]
    return _sigmoid_made(a, b, scale, bias, filled, largest, 1.0, needs)


def _like_inputs(a, b, scale, bias, *rest):
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((a, b, scale, bias), rest[-1]))


_sigmoid_made.register_fake(_like_inputs)
_sigmoid_bwd.register_fake(_like_inputs)


def _setup_context(ctx, inputs, output) -> None:
    a, b, scale, bias, row_label, col_label, ctx.reduction, ctx.made = inputs
    ctx.save_for_backward(a, b, scale, bias, row_label, col_label, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss: Tensor | None, *_grads: None):
    if d_loss is None:
        return (None,) * 8
    # read once: activation checkpointing computes them again
    a, b, scale, bias, row_label, col_label, *made = ctx.saved_tensors
    needs, share = list(ctx.needs_input_grad[:4]), 1 / max(len(a), 1) if ctx.reduction == "mean" else 1.0
    if all(there or not needed for there, needed in zip(ctx.made, needs)):
        results = _sigmoid_made(a, b, scale, bias, made, d_loss, share, needs)
    else:
        d_rows = d_loss if ctx.reduction == "none" else (d_loss * share).expand(len(a))
        results = _sigmoid_bwd(a, b, scale, bias, row_label, col_label, d_rows, needs)
    return *(dx if needed else None for dx, needed in zip(results, needs)), None, None, None, None


_sigmoid_fwd.register_autograd(_backward, setup_context=_setup_context)
for made in (_sigmoid_made, _sigmoid_bwd):
    made.register_autograd(has_no_derivative("sigmoid_loss", "mmkernels.sigmoid_loss_ref"))


def _run(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_label: Tensor | None,
    col_label: Tensor | None,
    coef: Tensor | None,
    needs: list[bool],
) -> blockwise.Made:
    labels = None if row_label is None or col_label is None else (row_label, col_label)
    path = kernel if runs_triton(a) else blockwise
    with torch.autocast(a.device.type, enabled=False):
        return path.sigmoid_fwd(a, b, scale, bias, labels, coef, needs)


def finished(dx: Tensor, a: Tensor, scale: Tensor) -> Tensor:
    """What a path has left of a feature's gradient in its accumulator's dtype, as the gradient."""
    return dx.mul_(scale / kernel.unit_of(a)) if runs_triton(a) and len(dx) else dx


def _check(a: Tensor, b: Tensor, labels: tuple[Tensor, Tensor] | None) -> None:
    op, shape_a, shape_b = "sigmoid_loss", list(a.shape), list(b.shape)
    require(op, a.ndim == 2, "a must be [M, D], got shape {}", shape_a)
    require(op, shape_a[1] > 0, "a must be at least one wide, got shape {}", shape_a)
    require(
        op,
        b.ndim == 2 and shape_b[1] == shape_a[1],
        "b must be [N, {}], as wide as a, got shape {}",
        shape_a[1],
        shape_b,
    )
    check_beside(op, "b", b, "a", a)
    check_dtype(op, "a", a)
    check_dtype(op, "b", b)
    require(
        op,
        labels is not None or shape_a == shape_b,
        "b must have the shape of a, {}, where there are no labels, got {}",
        shape_a,
        shape_b,
    )
    if labels is not None:
        check_index(op, "labels[0]", labels[0], shape_a[0], "a", a)
        check_index(op, "labels[1]", labels[1], shape_b[0], "a", a)
