"""The sigmoid loss, registered with torch: gradients are made in forward, while the logits are there."""

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
    if eager.is_faster(a, b):
        with torch.autocast(a.device.type, enabled=False):
            return eager.sigmoid_loss_eager(a, b, scale, bias, labels, reduction)
    reverse_only("sigmoid_loss", "mmkernels.sigmoid_loss_ref", a=a, b=b, logit_scale=scale, logit_bias=bias)
    total = reduction != "none"
    needs = [total and torch.is_grad_enabled() and x.requires_grad for x in (a, b, scale, bias)]
    loss = _sigmoid_fwd(a, b, scale, bias, *(labels or (None, None)), total, needs)[0]
    return loss / max(a.shape[0], 1) if reduction == "mean" else loss


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
    total: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, grads = _run(a, b, scale, bias, row_label, col_label, None, needs)
    filled = (loss.new_empty(0) if dx is None else dx for dx in grads)
    return (loss.sum() if total else loss).to(accumulator(a.dtype)), *filled  # pyright: ignore[reportReturnType]


@_sigmoid_fwd.register_fake
def _(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_label: Tensor | None,
    col_label: Tensor | None,
    total: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(a.dtype)
    made = ((a.shape, dtype), (b.shape, dtype), ((), torch.float64), ((), torch.float64))
    grads = (
        a.new_empty(shape, dtype=of) if needed else a.new_empty(0, dtype=torch.float64)
        for (shape, of), needed in zip(made, needs)
    )
    return a.new_empty(() if total else a.shape[:1], dtype=dtype), *grads  # pyright: ignore[reportReturnType]


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
    _, grads = _run(a, b, scale, bias, row_label, col_label, coef / largest, needs)
    return tuple(
        x.new_empty(0) if dx is None else (dx * largest).to(x.dtype).view(x.shape)
        for x, dx in zip((a, b, scale, bias), grads)
    )  # pyright: ignore[reportReturnType]


@_sigmoid_bwd.register_fake
def _(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_label: Tensor | None,
    col_label: Tensor | None,
    d_loss: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((a, b, scale, bias), needs))  # pyright: ignore[reportReturnType]


def _setup_context(ctx, inputs, output) -> None:
    a, b, scale, bias, row_label, col_label, ctx.total, ctx.made = inputs
    ctx.save_for_backward(a, b, scale, bias, row_label, col_label, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss: Tensor | None, *_grads: None):
    if d_loss is None:
        return (None,) * 8
    # read once: activation checkpointing computes them again
    a, b, scale, bias, row_label, col_label, *made = ctx.saved_tensors
    inputs, needs = (a, b, scale, bias), list(ctx.needs_input_grad[:4])
    # a second derivative, which there is none of, is refused by the op that has the inputs
    if all(there or not needed for there, needed in zip(ctx.made, needs)) and not torch.is_grad_enabled():
        # rounded only after the factor: float16's loss scale is in it
        grads = [
            (dx * d_loss).to(x.dtype).view(x.shape) if needed else None for x, dx, needed in zip(inputs, made, needs)
        ]
    else:
        d_rows = d_loss.expand(len(a)) if ctx.total else d_loss
        results = _sigmoid_bwd(*inputs, row_label, col_label, d_rows, needs)
        grads = [dx if needed else None for dx, needed in zip(results, needs)]
    return *grads, None, None, None, None


_sigmoid_fwd.register_autograd(_backward, setup_context=_setup_context)
_sigmoid_bwd.register_autograd(has_no_derivative("sigmoid_loss", "mmkernels.sigmoid_loss_ref"))


def _run(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_label: Tensor | None,
    col_label: Tensor | None,
    coef: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, blockwise.Grads]:
    labels = None if row_label is None or col_label is None else (row_label, col_label)
    path = kernel if runs_triton(a) else blockwise
    with torch.autocast(a.device.type, enabled=False):
        return path.sigmoid_fwd(a, b, scale, bias, labels, coef, needs)


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
