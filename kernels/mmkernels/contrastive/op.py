"""Differentiable contrastive statistics, registered with torch, and the symmetric InfoNCE loss of them."""

import torch
from torch import Tensor

from mmkernels._checks import autocast_operands, check_beside, check_dtype, require, scalar_tensor
from mmkernels._device import HAS_TRITON, runs_triton
from mmkernels._numerics import widen
from mmkernels.contrastive import blockwise
from mmkernels.contrastive.reference import contrastive_loss_ref, contrastive_stats_ref

if HAS_TRITON:
    from mmkernels.contrastive import kernel
else:
    kernel = blockwise

# Timed on two Zen 5 cores at D = 512: parity at 512 rows, from 640 on four products without the logits are faster.
EAGER_LOGITS = 576 * 576


def contrastive_stats(
    a: Tensor, b: Tensor, logit_scale: float | Tensor, *, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column log-sum-exp of `S = logit_scale * a b^T`, and `S[i, i + offset]`; S is never stored.

    Any contrastive softmax loss whose positives lie on a diagonal is vector arithmetic on these three, and
    they are differentiable in `a`, `b` and `logit_scale`. Inputs need not have unit norm. Under autocast the
    features are cast as a matrix product would cast them.

    Args:
        a: features `[M, D]`, float32, float16, bfloat16 or float64, any strides.
        b: features `[N, D]`, the dtype and device of `a`; `offset + M <= N`.
        logit_scale: the multiplier itself (already exponentiated): a finite float, or a tensor of one
            element, whose gradient comes back in its shape and dtype. A tensor on a GPU is not checked: that
            would wait for the device.
        offset: the column of row 0's positive, at least 0: a data-parallel rank's place in gathered features.

    Returns:
        `row_lse [M]`, `col_lse [N]`, `positive [M]`: float32, accumulated in float32 (float64 for float64).
        Without rows, `col_lse` is -inf.

    Raises:
        ValueError: a wrong shape, dtype, device, offset or scale.

    Reference: `contrastive_stats_ref`. The one-pass log-sum-exp follows arXiv:1805.02867.
    """
    _check_features(a, b, offset)
    a, b, scale = _operands(a, b, logit_scale)
    if _eager_is_faster(a, b):
        with torch.autocast(a.device.type, enabled=False):
            return contrastive_stats_ref(widen(a), widen(b), scale, offset=offset)
    row_lse, col_lse, positive, _, _ = _contrastive_fwd(a, b, scale, offset)
    return row_lse, col_lse, positive


def contrastive_loss(a: Tensor, b: Tensor, logit_scale: float | Tensor) -> Tensor:
    """Symmetric InfoNCE, `mean_i (row_lse_i + col_lse_i) / 2 - S[i, i]` with `S = logit_scale * a b^T`.

    Args:
        a: features `[B, D]`, float32, float16, bfloat16 or float64, any strides; unit norm is not required.
        b: features `[B, D]`, the dtype and device of `a`; row i is the positive of row i of `a`.
        logit_scale: the multiplier itself (already exponentiated): a finite float, or a tensor of one
            element, whose gradient comes back in its shape and dtype.

    Returns:
        The loss, a scalar: float32, accumulated in float32 (float64 for float64). An empty batch gives 0.

    Raises:
        ValueError: a wrong shape, dtype, device or scale.

    Reference: `contrastive_loss_ref`. Paper: arXiv:2103.00020.
    """
    _check_features(a, b, 0)
    require(
        "contrastive",
        a.shape == b.shape,
        "b must have the shape of a, {}, got {}",
        list(a.shape),
        list(b.shape),
    )
    a, b, scale = _operands(a, b, logit_scale)
    if _eager_is_faster(a, b):
        with torch.autocast(a.device.type, enabled=False):
            return contrastive_loss_ref(widen(a), widen(b), scale)
    row_lse, col_lse, positive, row_rest, col_rest = _contrastive_fwd(a, b, scale, 0)
    # the rests keep a small loss exact where the log-sum-exps are large
    of_rows, of_cols = (row_lse - positive) + row_rest, (col_lse - positive) + col_rest
    return (of_rows + of_cols).sum() / (2 * max(a.shape[0], 1))


def _operands(a: Tensor, b: Tensor, logit_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = scalar_tensor("contrastive", "logit_scale", logit_scale, "a", a)
    a, b = autocast_operands(a, b)
    require("contrastive", a.dtype == b.dtype, "b must have the dtype of a, {}, got {}", a.dtype, b.dtype)
    return a, b, scale


def _eager_is_faster(a: Tensor, b: Tensor) -> bool:
    """A pure function of shape: logits that stay in a CPU's cache are cheaper kept than recomputed."""
    return not a.is_cuda and not runs_triton(a) and 0 < a.shape[0] * b.shape[0] < EAGER_LOGITS


@torch.library.custom_op("mmkernels::contrastive_fwd", mutates_args=())
def _contrastive_fwd(
    a: Tensor, b: Tensor, scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = kernel if runs_triton(a) else blockwise
    with torch.autocast(a.device.type, enabled=False):
        return path.contrastive_fwd(a, b, scale, offset)


@_contrastive_fwd.register_fake
def _(a: Tensor, b: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    num_rows, num_cols = a.shape[0], b.shape[0]
    sizes = (num_rows, num_cols, num_rows, num_rows, num_cols)
    return tuple(a.new_empty(size, dtype=dtype) for size in sizes)  # pyright: ignore[reportReturnType]


@torch.library.custom_op("mmkernels::contrastive_bwd", mutates_args=())
def _contrastive_bwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    stats: list[Tensor],
    grads: list[Tensor],
    offset: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    path = kernel if runs_triton(a) else blockwise
    grads = [d.contiguous() for d in grads]
    with torch.autocast(a.device.type, enabled=False):
        results = path.contrastive_bwd(a, b, scale, tuple(stats), tuple(grads), offset, needs)
    return tuple(
        like.new_empty(0) if dx is None else dx.to(like.dtype).view(like.shape)
        for dx, like in zip(results, (a, b, scale))
    )  # pyright: ignore[reportReturnType]


@_contrastive_bwd.register_fake
def _(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    stats: list[Tensor],
    grads: list[Tensor],
    offset: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((a, b, scale), needs))  # pyright: ignore[reportReturnType]


def _setup_context(ctx, inputs, output) -> None:
    a, b, scale, offset = inputs
    ctx.save_for_backward(a, b, scale, *output)
    ctx.offset = offset
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, d_row: Tensor, d_col: Tensor, d_pos: Tensor, *_rests: None):
    a, b, scale, *stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    results = _contrastive_bwd(a, b, scale, stats, [d_row, d_col, d_pos], ctx.offset, needs)
    return *(dx if needed else None for dx, needed in zip(results, needs)), None


_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)


def _check_features(a: Tensor, b: Tensor, offset: int) -> None:
    shape_a, shape_b = list(a.shape), list(b.shape)
    require("contrastive", a.ndim == 2, "a must be [M, D], got shape {}", shape_a)
    require("contrastive", shape_a[1] > 0, "a must be at least one wide, got shape {}", shape_a)
    require(
        "contrastive",
        b.ndim == 2 and shape_b[1] == shape_a[1],
        "b must be [N, {}], as wide as a, got shape {}",
        shape_a[1],
        shape_b,
    )
    check_beside("contrastive", "b", b, "a", a)
    check_dtype("contrastive", "a", a)
    check_dtype("contrastive", "b", b)
    require("contrastive", offset >= 0, "offset must be at least 0, got {}", offset)
    needed = shape_a[0] + offset
    require(
        "contrastive",
        needed <= shape_b[0],
        "b must have at least M + offset = {} rows, got {}",
        needed,
        shape_b[0],
    )
