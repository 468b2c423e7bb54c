"""Differentiable contrastive statistics, registered with torch."""

from collections.abc import Iterable
from dataclasses import replace

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
from mmkernels._gemm import factor, matmul_nt
from mmkernels.contrastive import blockwise
from mmkernels.contrastive.problem import MAX_LOGITS, ContrastiveStats, Problem, of_seen, poisoned

kernel = Kernels("mmkernels.contrastive")

# On a CPU so many logits are kept for a backward: three products, and 16 MiB, where the streamed form has four.
STORED_LOGITS = 2048 * 2048

# The largest scale that `normalized=True` lets pass.
MAX_SCALE = 128.0


def contrastive_stats(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    symmetric: bool = True,
    teacher: tuple[Tensor, Tensor] | None = None,
    normalized: bool = False,
) -> ContrastiveStats:
    """Row and column log-sum-exp of `S = logit_scale * a b^T`, the logits of the positives, and the
    expectations of S under a teacher's softmax, `row_cross_i = sum_j T_ij S_ij`; no matrix is ever stored (but up
    to 16 MiB on a CPU, for a backward).

    Any contrastive softmax loss is vector arithmetic on these, and they are differentiable in `a`, `b` and
    `logit_scale`. Inputs need not have unit norm. Under autocast the features are cast as a matrix product
    would cast them.

    Args:
        a: features `[M, D]`, float32, float16, bfloat16 or float64, any strides.
        b: features `[N, D]`, the dtype and device of `a`.
        logit_scale: the multiplier itself (already exponentiated): a finite float, or a tensor of one
            element, whose gradient comes back in its shape and dtype. A tensor on a GPU is not checked: that
            would wait for the device.
        positives: int64 `[M]`, the column of each row's positive; -1 where a row has none.
        exclude: int64 `[M]`, the column that a row does not see: as if that logit, and the teacher's, were -inf, in the
            row and in the column, with a gradient of exactly zero; none where it is outside 0 to N - 1. It must not be
            the row's positive: on a GPU, where that is not read, the logit is then of no meaning.
        symmetric: whether the columns' statistics are wanted too.
        teacher: features `[M, D]` and `[N, D]`, constants, whose similarities `logit_scale * ta tb^T` are
            softmaxed along rows and along columns to T and T'.
        normalized: the caller's word that every row of `a`, `b` and the teacher has unit norm, within 1 %,
            and that `logit_scale` is at most 128: a check, nothing is faster by it. A wrong claim raises on a CPU and
            gives NaN on a GPU.

    Returns:
        The fields `[M]` and `[N]` in float32, accumulated in float32 (float64 for float64). Of no rows,
        `col_lse` is -inf; of no columns, `row_lse` is; likewise where all are excluded. An expectation of nothing is no
        number.

    Raises:
        ValueError: a wrong shape, dtype, device, index or scale.

    Reference: `contrastive_stats_ref`. The one-pass log-sum-exp follows arXiv:1805.02867; the teacher's
    targets are ALBEF's (arXiv:2107.07651).
    """
    a, b, scale, teacher = operands(a, b, logit_scale, teacher)
    if positives is not None:
        check_positives(a, b, positives, -1)
        positives = positives.contiguous()
    if exclude is not None:
        check_exclude(a, exclude, positives)
        exclude = exclude.contiguous()
    reverse_only("contrastive_stats", "mmkernels.contrastive_stats_ref", a=a, b=b, logit_scale=scale)
    teacher_a, teacher_b = teacher or (None, None)
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, scale))
    keep = learned and logits_are_kept(a, len(b))
    *stats, _ = _contrastive_fwd(a, b, scale, positives, exclude, teacher_a, teacher_b, symmetric, normalized, keep)
    return ContrastiveStats(*stats)


def contrastive_lse(
    a: Tensor, b: Tensor, logit_scale: float | Tensor, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`logsumexp(S, 1)` and `logsumexp(S, 0)` of `S = logit_scale * a b^T`, for losses of one's own.

    Args:
        a: features `[M, D]`, float32, float16, bfloat16 or float64, any strides; unit norm is not required.
        b: features `[N, D]`, the dtype and device of `a`.
        logit_scale: the multiplier itself: a finite float, or a tensor of one element, with its gradient.
        exclude: int64 `[M]`, the column that a row does not see, see `contrastive_stats`.

    Returns:
        `row_lse [M]`, `col_lse [N]`: float32, accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype, device or scale.

    Reference: `contrastive_lse_ref`. Paper: arXiv:1805.02867.
    """
    stats = contrastive_stats(a, b, logit_scale, exclude=exclude)
    return stats.row_lse, stats.col_lse


def logits_are_kept(a: Tensor, num_cols: int) -> bool:
    """A pure function of shape: logits that stay in a CPU's cache are cheaper kept than recomputed."""
    return not (a.is_cuda or runs_triton(a)) and 0 < len(a) * num_cols < STORED_LOGITS


def operands(
    a: Tensor, b: Tensor, logit_scale: float | Tensor, teacher: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Checked and cast for autocast; the scale as a tensor."""
    check_features("a", a, "M")
    check_features("b", b, "N", a)
    scale = scalar_tensor("contrastive", "logit_scale", logit_scale, "a", a)
    a, b, *more = autocast_operands(a, b, *(teacher or ()))
    require("contrastive", a.dtype == b.dtype, "b must have the dtype of a, {}, got {}", a.dtype, b.dtype)
    if not more:
        return a, b, scale, None
    for name, x, like in (("teacher[0]", more[0], a), ("teacher[1]", more[1], b)):
        require(
            "contrastive",
            x.shape == like.shape and x.dtype == like.dtype,
            "{} must be {} {} like the student's, got {} {}",
            name,
            like.dtype,
            list(like.shape),
            x.dtype,
            list(x.shape),
        )
        check_beside("contrastive", name, x, "a", a)
    return a, b, scale, (more[0].detach(), more[1].detach())


def check_features(name: str, x: Tensor, rows: str, like: Tensor | None = None) -> None:
    """`x` must be `[rows, D]`, D at least one and as wide as `like`, on its device."""
    shape = list(x.shape)
    require("contrastive", x.ndim == 2, "{} must be [{}, D], got shape {}", name, rows, shape)
    require("contrastive", shape[1] > 0, "{} must be at least one wide, got shape {}", name, shape)
    check_dtype("contrastive", name, x)
    if like is not None:
        width = like.shape[1]
        require(
            "contrastive",
            shape[1] == width,
            "{} must be [{}, {}], as wide as a, got shape {}",
            name,
            rows,
            width,
            shape,
        )
        check_beside("contrastive", name, x, "a", like)


def check_positives(a: Tensor, b: Tensor, positives: Tensor, least: int) -> None:
    """int64 `[M]`, each from `least` to N - 1; on a GPU the values are not read, a wrong one gives NaN."""
    check_index("contrastive", "positives", positives, a.shape[0], "a", a)
    if not positives.is_cuda and not torch.compiler.is_compiling() and len(positives):
        low, high = (int(x) for x in positives.aminmax())
        require(
            "contrastive",
            least <= low and high < b.shape[0],
            "positives must be from {} to N - 1 = {}, got {} to {}",
            least,
            b.shape[0] - 1,
            low,
            high,
        )


def check_exclude(a: Tensor, exclude: Tensor, positives: Tensor | None) -> None:
    """int64 `[M]`, nowhere a row's positive; on a GPU the values are not read."""
    check_index("contrastive", "exclude", exclude, a.shape[0], "a", a)
    if positives is None or exclude.is_cuda or torch.compiler.is_compiling():
        return
    both = (exclude == positives) & (positives >= 0)
    if both.any():
        row = int(both.nonzero()[0])
        sentence = "exclude must not be the row's positive, got column {} for row {}"
        require("contrastive", False, sentence, int(exclude[row]), row)


@torch.library.custom_op("mmkernels::contrastive_fwd", mutates_args=())
def _contrastive_fwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    exclude: Tensor | None,
    teacher_a: Tensor | None,
    teacher_b: Tensor | None,
    symmetric: bool,
    normalized: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics, and all cosines `[M, N]` where they are to be kept (on the blockwise path), else `[0, 0]`."""
    problem = Problem(a, b, scale, positives, teacher_a, teacher_b, symmetric, exclude=exclude)
    path = kernel if runs_triton(a) else blockwise
    with torch.autocast(a.device.type, enabled=False):
        broken = broken_claim(problem) if normalized else None
        if keep:
            problem = replace(problem, cosines=matmul_nt(factor(a), factor(b)))
        stats = poisoned(path.contrastive_fwd(problem), broken)
    cosines = a.new_empty(0, 0, dtype=accumulator(a.dtype)) if problem.cosines is None else problem.cosines
    return (*stats, cosines)  # pyright: ignore[reportReturnType]


@_contrastive_fwd.register_fake
def _(a, b, scale, positives, exclude, teacher_a, teacher_b, symmetric, normalized, keep=False):
    num_rows, num_cols = a.shape[0], b.shape[0] if symmetric else 0
    rows, cols = (num_rows, num_cols) if teacher_a is not None else (0, 0)
    of_positives = 0 if positives is None else num_rows
    sizes = (num_rows, num_cols, of_positives, rows, cols, num_rows, num_cols, rows, cols, of_positives)
    kept = (num_rows, b.shape[0]) if keep else (0, 0)
    return tuple(a.new_empty(size, dtype=accumulator(a.dtype)) for size in (*sizes, kept))


@torch.library.custom_op("mmkernels::contrastive_bwd", mutates_args=())
def _contrastive_bwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    exclude: Tensor | None,
    teacher_a: Tensor | None,
    teacher_b: Tensor | None,
    symmetric: bool,
    stats: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
    cosines: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(a, b, scale, positives, teacher_a, teacher_b, symmetric, cosines, exclude)
    path = kernel if runs_triton(a) else blockwise
    with torch.autocast(a.device.type, enabled=False):
        found, contiguous = ContrastiveStats(*stats), [d.contiguous() for d in grads]
        if exclude is not None:
            found, contiguous = of_seen(found, contiguous)
        results = list(path.contrastive_bwd(problem, found, contiguous, needs))
    return _in_place_of(results, (a, b, scale))


@_contrastive_bwd.register_fake
def _(a, b, scale, positives, exclude, teacher_a, teacher_b, symmetric, stats, grads, needs, cosines=None):
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((a, b, scale), needs))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, symmetric, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.symmetric = symmetric
    ctx.mark_non_differentiable(*output[5:])


def _backward(ctx, *grads: Tensor):
    *tensors, cosines = ctx.saved_tensors
    inputs, stats = tensors[:7], tensors[7:]
    needs = list(ctx.needs_input_grad[:3])
    kept = cosines if cosines.numel() else None
    results = _contrastive_bwd(*inputs, ctx.symmetric, stats, list(grads[:5]), needs, kept)
    return *(dx if needed else None for dx, needed in zip(results, needs)), *(None,) * 7


_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)
_contrastive_bwd.register_autograd(has_no_derivative("contrastive_stats", "mmkernels.contrastive_stats_ref"))


def pair_losses_are_fused(a: Tensor) -> bool:
    """Whether the losses of pairs on the diagonal are made by kernels: elsewhere they are arithmetic on statistics."""
    return runs_triton(a) and 0 < len(a) ** 2 <= MAX_LOGITS


@torch.library.custom_op("mmkernels::contrastive_pairs_fwd", mutates_args=())
def contrastive_pairs(a: Tensor, b: Tensor, scale: Tensor, symmetric: bool, normalized: bool) -> tuple[Tensor, Tensor]:
    """InfoNCE of each pair of rows `[B]`, and what its backward needs, `[6, B]`."""
    with torch.autocast(a.device.type, enabled=False):
        broken = broken_claim(Problem(a, b, scale, None, None, None, symmetric)) if normalized else None
        losses, kept = kernel.pair_losses_fwd(a, b, scale, symmetric)
        return losses if broken is None else losses.masked_fill_(broken, torch.nan), kept


@contrastive_pairs.register_fake
def _(a, b, scale, symmetric, normalized):
    return tuple(a.new_empty(shape, dtype=torch.float32) for shape in (len(a), (6, len(a))))


@torch.library.custom_op("mmkernels::contrastive_pairs_bwd", mutates_args=())
def _contrastive_pairs_bwd(
    a: Tensor, b: Tensor, scale: Tensor, symmetric: bool, kept: Tensor, d_losses: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(a.device.type, enabled=False):
        results = list(kernel.pair_losses_bwd(a, b, scale, symmetric, kept, d_losses.contiguous(), needs))
    return _in_place_of(results, (a, b, scale))


@_contrastive_pairs_bwd.register_fake
def _(a, b, scale, symmetric, kept, d_losses, needs):
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((a, b, scale), needs))


def _setup_pairs(ctx, inputs, output) -> None:
    a, b, scale, ctx.symmetric, _ = inputs
    ctx.save_for_backward(a, b, scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_pairs(ctx, d_losses: Tensor | None, _d_kept: None):
    if d_losses is None:
        return (None,) * 5
    a, b, scale, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    results = _contrastive_pairs_bwd(a, b, scale, ctx.symmetric, kept, d_losses, needs)
    return *(dx if needed else None for dx, needed in zip(results, needs)), None, None


contrastive_pairs.register_autograd(_backward_pairs, setup_context=_setup_pairs)
_contrastive_pairs_bwd.register_autograd(has_no_derivative("contrastive_loss", "mmkernels.contrastive_loss_ref"))


def _in_place_of(results: list[Tensor | None], inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtypes and shapes of the inputs, empty where there is none; `results` is emptied, so that what
    has been narrowed is freed before the next."""
    return tuple(_like(results.pop(0), like) for like in inputs)  # pyright: ignore[reportReturnType]


def _like(dx: Tensor | None, like: Tensor) -> Tensor:
    if dx is None:
        return like.new_empty(0)
    return dx.to(like.dtype) if dx.shape == like.shape else dx.to(like.dtype).view_as(like)


def broken_claim(problem: Problem) -> Tensor | None:
    """On a CPU raises if the features are not of unit norm or the scale is too large; on a GPU a bool tensor."""
    named = {"a": problem.a, "b": problem.b, "teacher[0]": problem.teacher_a, "teacher[1]": problem.teacher_b}
    norms = {
        name: torch.linalg.vector_norm(x.detach(), dim=1, dtype=accumulator(x.dtype))
        for name, x in named.items()
        if x is not None
    }
    if problem.a.is_cuda:
        wrong = [((norm - 1).abs() > 0.01).any() for norm in norms.values()]
        return torch.stack([*wrong, (problem.scale > MAX_SCALE).any()]).any()
    for name, norm in norms.items():
        off = (norm - 1).abs()
        worst = float(norm[off.argmax()]) if len(norm) else 1.0
        require(
            "contrastive",
            not abs(worst - 1) > 0.01,
            "{} must have rows of unit norm, as normalized=True claims, got a row of norm {:.3g}",
            name,
            worst,
        )
    scale = problem.scale.item()
    require(
        "contrastive",
        not scale > MAX_SCALE,
        "logit_scale must be at most {:g} with normalized=True, got {}",
        MAX_SCALE,
        scale,
    )
    return None
