"""Linear cross-entropy, registered with torch: gradients are made in forward, while the logits are there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept

from mmkernels._autograd import has_no_derivative, reverse_only
from mmkernels._checks import accumulator, autocast_operands, check_beside, check_dtype, check_index, require
from mmkernels._device import Awaited, Kernels, is_capturing, runs_triton
from mmkernels._gemm import is_low
from mmkernels._numerics import widen
from mmkernels.linear_cross_entropy import blockwise, eager

kernel = Kernels("mmkernels.linear_cross_entropy")

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`lse_t - (1 - eps) logit_t[target_t] - eps mean_v logit_tv + z lse_t^2` of `logits = hidden weight^T + bias`.

    The logits are never stored whole, and rows whose target is `ignore_index` are left out before the first
    product. On a GPU the host asks for the number of the others behind a product of the first 1,024; of so few
    rows, and while a CUDA graph is captured, ignored ones are computed and weighted by zero. Where a gradient is
    wanted of a mean or a sum, it is made in forward (three products in all; backward only scales it). Of
    `reduction="none"`, backward computes the logits again (four products). A frozen `hidden` or `weight` saves
    its product.

    Args:
        hidden: `[T, D]`, float32, float16, bfloat16 or float64, any strides. Cast under autocast, as are
            `weight` and `bias`.
        weight: `[V, D]`, the dtype and device of `hidden`.
        targets: int64 `[T]`, each `ignore_index` or in [0, V). Any other is refused on a CPU; on a GPU, where
            looking would wait for the device, it makes its row's loss NaN.
        bias: `[V]`, the dtype and device of `hidden`; -inf takes a token out of the vocabulary.
        ignore_index: the target of rows that do not count; it may lie in [0, V).
        label_smoothing: eps, in [0, 1].
        z_loss: z, at least 0; 1e-4 is common.
        reduction: "none", "sum", or "mean" over the rows that count.

    Returns:
        The loss, a scalar, or `[T]` with 0 at ignored rows for "none": float32, accumulated in float32
        (float64 for float64). The mean over no rows is 0, where `torch.nn.functional.cross_entropy` has NaN.

    Raises:
        ValueError: a wrong shape, dtype, device, target, or option.

    Reference: `linear_cross_entropy_ref`. Papers: arXiv:1512.00567 (label smoothing), arXiv:2204.02311
    (z-loss), arXiv:2411.09009 (cross-entropy without the logits).
    """
    _check(hidden, weight, targets, bias)
    _check_options(label_smoothing, z_loss, reduction)
    hidden, weight = autocast_operands(hidden, weight)
    _check_same_dtype("weight", weight, hidden)
    if bias is not None:
        bias = autocast_operands(bias)[0]
        _check_same_dtype("bias", bias, hidden)
    if eager.is_faster(hidden, weight):
        if not torch.compiler.is_compiling():
            _check_targets(targets, ignore_index, len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            return eager.linear_cross_entropy_eager(
                hidden,
                weight,
                targets,
                bias=bias,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                reduction=reduction,
            )
    instead = "mmkernels.linear_cross_entropy_ref"
    reverse_only("linear_cross_entropy", instead, hidden=hidden, weight=weight, bias=bias)
    total = reduction != "none"
    needs = [total and torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    terms = [label_smoothing, z_loss]
    loss = _linear_cross_entropy_fwd(hidden, weight, bias, targets, ignore_index, terms, total, needs)[0]
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss


@torch.library.custom_op("mmkernels::linear_cross_entropy_fwd", mutates_args=())
def _linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    terms: list[float],
    total: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coef = hidden.new_ones(len(hidden), dtype=accumulator(hidden.dtype))
    loss, *grads = _run(hidden, weight, bias, targets, coef, ignore_index, terms, needs)
    # bfloat16 has float32's range: a loss scale loses nothing by coming after the rounding, and half is kept
    kept = hidden.dtype if is_low(hidden) else coef.dtype
    filled = (coef.new_empty(0, dtype=kept) if dx is None else dx.to(kept) for dx in grads)
    return loss.sum() if total else loss, *filled  # pyright: ignore[reportReturnType]


@_linear_cross_entropy_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    terms: list[float],
    total: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(hidden.dtype)
    loss = hidden.new_empty(() if total else hidden.shape[:1], dtype=dtype)
    shapes = (x.shape if x is not None and needed else (0,) for x, needed in zip((hidden, weight, bias), needs))
    kept = hidden.dtype if is_low(hidden) else dtype
    return loss, *(hidden.new_empty(shape, dtype=kept) for shape in shapes)  # pyright: ignore[reportReturnType]


@torch.library.custom_op("mmkernels::linear_cross_entropy_bwd", mutates_args=())
def _linear_cross_entropy_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    d_loss: Tensor,
    ignore_index: int,
    terms: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    coef = d_loss.to(accumulator(hidden.dtype))
    # the kernel stores gradients of coefficients up to 1; tiny ones would leave float16's range
    largest = coef.abs().amax().clamp_min(torch.finfo(coef.dtype).tiny) if len(coef) else coef.new_ones(())
    _, *grads = _run(hidden, weight, bias, targets, coef / largest, ignore_index, terms, needs)
    return tuple(hidden.new_empty(0) if dx is None else dx.mul_(largest).to(hidden.dtype) for dx in grads)  # pyright: ignore[reportReturnType]


@_linear_cross_entropy_bwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    d_loss: Tensor,
    ignore_index: int,
    terms: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape if x is not None and needed else (0,) for x, needed in zip((hidden, weight, bias), needs))
    return tuple(hidden.new_empty(shape) for shape in shapes)  # pyright: ignore[reportReturnType]


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, ctx.ignore_index, ctx.terms, ctx.total, ctx.made = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of [V, D] for the outputs that have no gradient


def _backward(ctx, d_loss: Tensor, *_grads: None):
    hidden, weight, bias, targets, *made = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    # a second derivative, which there is none of, is refused by the op that has the inputs
    if all(there or not needed for there, needed in zip(ctx.made, needs)) and not torch.is_grad_enabled():
        grads = [_scaled(dx, d_loss, hidden.dtype) if needed else None for dx, needed in zip(made, needs)]
    else:
        d_rows = d_loss.expand(len(hidden)) if ctx.total else d_loss
        results = _linear_cross_entropy_bwd(hidden, weight, bias, targets, d_rows, ctx.ignore_index, ctx.terms, needs)
        grads = [dx if needed else None for dx, needed in zip(results, needs)]
    return *grads, None, None, None, None, None


def _scaled(dx: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor dx`, rounded only now: float16's loss scale is in the factor.

    On a GPU in one pass. On a CPU in place, unless the graph is kept or traced: there fresh pages for [V, D] cost half
    of a product.
    """
    if dx.is_cuda and dx.dtype != dtype and type(dx) is Tensor:
        return torch.mul(dx, factor, out=torch.empty_like(dx, dtype=dtype))
    may_write = type(dx) is Tensor and not graph_is_kept()
    if may_write and not dx.is_cuda and factor == 1:
        return dx.to(dtype)
    return (dx.mul_(factor) if may_write else dx * factor).to(dtype)


_linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)
_linear_cross_entropy_bwd.register_autograd(
    has_no_derivative("linear_cross_entropy", "mmkernels.linear_cross_entropy_ref")
)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coef: Tensor,
    ignore_index: int,
    terms: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss of each row, and the gradients of `sum coef * loss` that `needs` asks for."""
    num_rows, vocab = len(hidden), len(weight)
    if not hidden.is_cuda:
        _check_targets(targets, ignore_index, vocab)
    kept = targets != ignore_index
    index, num_kept = _rows(kept, hidden)
    is_taken = num_kept is not None or (index is not None and len(index) < num_rows)
    if is_taken:
        hidden, targets, coef = hidden[index], targets[index], coef[index]
        kept = None if num_kept is None else kept[index]
    if kept is not None and (is_taken or index is None):
        # what an ignored row holds, NaN too, goes nowhere
        hidden, coef = hidden.masked_fill(~kept[:, None], 0), coef.masked_fill(~kept, 0)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = (targets, ignore_index, coef, num_kept)
        loss, dh, dw, db = _run_rows(hidden, weight, bias, rows, terms, needs)
    if index is not None and is_taken:
        loss = loss.new_zeros(num_rows).index_copy_(0, index, loss)
        dh = None if dh is None else dh.new_zeros(num_rows, dh.shape[1]).index_copy_(0, index, dh)
    return loss, dh, dw, db


def _rows(kept: Tensor, hidden: Tensor) -> tuple[Tensor | None, Awaited | None]:
    """The rows to compute, None for all as they are, and, where ignored ones are behind them, how many count.

    A GPU is not left without work while the host waits for that number: the kernel's launcher asks for it behind a
    first product. Of few rows, and while a CUDA graph is captured, all are computed.
    """
    if not _counts_ahead(hidden):
        return (None if hidden.is_cuda else kept.nonzero()[:, 0]), None
    return (~kept).argsort(stable=True), Awaited(kept.sum())


def _counts_ahead(hidden: Tensor) -> bool:
    return hidden.is_cuda and runs_triton(hidden) and len(hidden) > kernel.AHEAD and not is_capturing(hidden)


def _run_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: tuple[Tensor, int, Tensor, Awaited | None],
    terms: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same of rows that were chosen. The smoothing's gradient is alike in all columns: of rank one, and added
    here."""
    path, coef = kernel if runs_triton(hidden) else blockwise, rows[2]
    smoothing, share = terms[0], terms[0] / len(weight)
    new = coef.new_empty if len(hidden) else coef.new_zeros  # no rows write nothing
    dh, dw, db = (
        new(x.shape) if x is not None and needed else None for x, needed in zip((hidden, weight, bias), needs)
    )
    if dw is not None and path is blockwise and is_low(hidden) and len(hidden) and not smoothing:
        one_chunk = blockwise.is_one_chunk(len(hidden), len(weight), coef.element_size())
        dw = torch.empty(weight.shape, dtype=weight.dtype) if one_chunk else dw
    grads = dh, dw, db
    if not smoothing:
        return path.linear_cross_entropy_fwd(hidden, weight, bias, rows, None, terms, grads), dh, dw, db
    wide, mean_weight = widen(hidden), weight.mean(0, dtype=coef.dtype)
    mean_logit = wide @ mean_weight
    if bias is not None:
        mean_logit += bias.mean(dtype=coef.dtype)
    loss = path.linear_cross_entropy_fwd(hidden, weight, bias, rows, mean_logit, terms, grads)
    if dh is not None:
        dh.addr_(coef, mean_weight, alpha=-smoothing)
    if dw is not None:
        dw -= share * (coef @ wide)
    if db is not None:
        db -= share * coef.sum()
    return loss, dh, dw, db


def _check_targets(targets: Tensor, ignore_index: int, vocab: int) -> None:
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if outside.any():
        sentence = "targets must lie in [0, {}) or be ignore_index, {}, got {}"
        require("linear_cross_entropy", False, sentence, vocab, ignore_index, targets[outside][0].item())


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    op, shape, of_weight = "linear_cross_entropy", list(hidden.shape), list(weight.shape)
    require(op, hidden.ndim == 2, "hidden must be [T, D], got shape {}", shape)
    require(op, shape[1] > 0, "hidden must be at least one wide, got shape {}", shape)
    require(
        op,
        weight.ndim == 2 and of_weight[1] == shape[1],
        "weight must be [V, {}], as wide as hidden, got shape {}",
        shape[1],
        of_weight,
    )
    require(op, of_weight[0] > 0, "weight must have at least one row, got shape {}", of_weight)
    check_dtype(op, "hidden", hidden)
    check_dtype(op, "weight", weight)
    check_beside(op, "weight", weight, "hidden", hidden)
    check_index(op, "targets", targets, shape[0], "hidden", hidden)
    if bias is not None:
        require(
            op, list(bias.shape) == of_weight[:1], "bias must be [{}], got shape {}", of_weight[0], list(bias.shape)
        )
        check_dtype(op, "bias", bias)
        check_beside(op, "bias", bias, "hidden", hidden)


def _check_same_dtype(name: str, x: Tensor, hidden: Tensor) -> None:
    sentence = "{} must have the dtype of hidden, {}, got {}"
    require("linear_cross_entropy", x.dtype == hidden.dtype, sentence, name, hidden.dtype, x.dtype)


def _check_options(label_smoothing: float, z_loss: float, reduction: str) -> None:
    op = "linear_cross_entropy"
    require(op, 0 <= label_smoothing <= 1, "label_smoothing must be in [0, 1], got {}", label_smoothing)
    require(op, 0 <= z_loss < math.inf, "z_loss must be finite and at least 0, got {}", z_loss)
    require(op, reduction in REDUCTIONS, "reduction must be one of {}, got {}", ", ".join(REDUCTIONS), reduction)
