"""Differentiable token-contrastive statistics, registered with torch."""

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
from mmkernels.token_contrastive import blockwise, late
from mmkernels.token_contrastive.problem import Problem, TokenContrastiveStats, field_sizes

kernel = Kernels("mmkernels.token_contrastive")

OP = "token_contrastive"
Labels = tuple[Tensor, Tensor]
Masks = tuple[Tensor | None, Tensor | None]


def token_contrastive_stats(
    tokens: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    labels: Labels | None = None,
    masks: Masks | None = None,
    with_totals: bool = False,
) -> TokenContrastiveStats:
    """Row and column log-sum-exp of `S_ij = logit_scale * max_q <tokens_iq, b_j>`, and sums of S; neither S nor
    the products of tokens are ever stored.

    With tokens on both sides, late interaction: the rows' fields are of `S_row_ij = logit_scale * mean_q max_t
    <tokens_iq, b_jt>`, the columns' of `S_col_ij = logit_scale * mean_t max_q <tokens_iq, b_jt>`.

    Any contrastive softmax loss is vector arithmetic on these, and they are differentiable in `tokens`, `b` and
    `logit_scale`; of equal products the first token takes the gradient. Under autocast the features are cast
    as a matrix product would cast them.

    Args:
        tokens: features `[M, Q, D]`, float32, float16, bfloat16 or float64, any strides; unit norm is not
            required.
        b: features `[N, D]`, or `[N, T, D]` for late interaction, the dtype and device of `tokens`.
        logit_scale: the multiplier itself (already exponentiated): a finite float, or a tensor of one element,
            whose gradient comes back in its shape and dtype. A tensor on a GPU is not checked: that would wait
            for the device.
        positives: int64 `[M]`, the column of each row's positive; -1 where a row has none. On a GPU the values
            are not read; one out of range gives NaN.
        labels: int64 `[M]` and `[N]`: the sums of S over equal labels are wanted.
        masks: bool `[M, Q]` and `[N, T]`, either may be None: True where a token counts. Where a row or a
            column has none, S = 0, without a gradient.
        with_totals: whether the plain sums of S are wanted (for label smoothing).

    Returns:
        The fields `[M]` and `[N]` in float32, accumulated in float32 (float64 for float64). Of no rows,
        `col_lse` is -inf; of no columns, `row_lse` is.

    Raises:
        ValueError: a wrong shape, dtype, device, index or scale.

    Reference: `token_contrastive_stats_ref`. The one-pass log-sum-exp follows arXiv:1805.02867; late interaction
    is FILIP's (arXiv:2111.07783).
    """
    tokens, b, scale = operands(tokens, b, logit_scale)
    reverse_only(f"{OP}_stats", f"mmkernels.{OP}_stats_ref", tokens=tokens, b=b, logit_scale=scale)
    if positives is not None:
        check_positives(tokens, b, positives, -1)
    row_labels, col_labels = check_labels(tokens, b, labels) or (None, None)
    tokens_mask, b_mask = check_masks(tokens, b, masks)
    fields = _token_contrastive_fwd(
        tokens, b, scale, positives, row_labels, col_labels, tokens_mask, b_mask, with_totals
    )
    return TokenContrastiveStats(*fields)


def operands(tokens: Tensor, b: Tensor, logit_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked and cast for autocast; the scale as a tensor."""
    shape = list(tokens.shape)
    require(
        OP,
        tokens.ndim == 3 and 0 not in shape[1:],
        "tokens must be [M, Q, D], Q and D at least one, got shape {}",
        shape,
    )
    check_dtype(OP, "tokens", tokens)
    check_dtype(OP, "b", b)
    require(
        OP,
        b.ndim in (2, 3) and b.shape[-1] == shape[2] and 0 not in b.shape[1:],
        "b must be [N, {}] or [N, T, {}], as wide as tokens, T at least one, got shape {}",
        shape[2],
        shape[2],
        list(b.shape),
    )
    check_beside(OP, "b", b, "tokens", tokens)
    scale = scalar_tensor(OP, "logit_scale", logit_scale, "tokens", tokens)
    tokens, b = autocast_operands(tokens, b)
    require(OP, tokens.dtype == b.dtype, "b must have the dtype of tokens, {}, got {}", tokens.dtype, b.dtype)
    return tokens, b, scale


def check_positives(tokens: Tensor, b: Tensor, positives: Tensor, least: int) -> None:
    """int64 `[M]`, each from `least` to N - 1; on a GPU the values are not read."""
    check_index(OP, "positives", positives, tokens.shape[0], "tokens", tokens)
    if not positives.is_cuda and not torch.compiler.is_compiling() and len(positives):
        low, high = (int(x) for x in positives.aminmax())
        require(
            OP,
            least <= low and high < b.shape[0],
            "positives must be from {} to N - 1 = {}, got {} to {}",
            least,
            b.shape[0] - 1,
            low,
            high,
        )


def check_labels(tokens: Tensor, b: Tensor, labels: Labels | None) -> Labels | None:
    if labels is not None:
        for name, x, like in (("labels[0]", labels[0], tokens), ("labels[1]", labels[1], b)):
            check_index(OP, name, x, like.shape[0], "tokens", tokens)
    return labels


def check_masks(tokens: Tensor, b: Tensor, masks: Masks | None) -> Masks:
    tokens_mask, b_mask = masks or (None, None)
    require(OP, b_mask is None or b.ndim == 3, "masks[1] must be None where b is [N, D], got {}", "a mask")
    for name, mask, x in (("masks[0]", tokens_mask, tokens), ("masks[1]", b_mask, b)):
        if mask is not None:
            require(
                OP,
                mask.dtype == torch.bool and mask.shape == x.shape[:2],
                "{} must be bool {}, got {} {}",
                name,
                list(x.shape[:2]),
                mask.dtype,
                list(mask.shape),
            )
            check_beside(OP, name, mask, "tokens", tokens)
    return tokens_mask, b_mask


@torch.library.custom_op("mmkernels::token_contrastive_fwd", mutates_args=())
def _token_contrastive_fwd(
    tokens: Tensor,
    b: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    tokens_mask: Tensor | None,
    b_mask: Tensor | None,
    with_totals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(tokens, b, scale, positives, row_labels, col_labels, tokens_mask, b_mask, with_totals)
    with torch.autocast(tokens.device.type, enabled=False):
        return tuple(_path(problem).token_contrastive_fwd(problem))  # pyright: ignore[reportReturnType]


@_token_contrastive_fwd.register_fake
def _(*args):
    problem = Problem(*args)
    dtype = accumulator(problem.tokens.dtype)
    return tuple(problem.tokens.new_empty((size,), dtype=dtype) for size in field_sizes(problem))


@torch.library.custom_op("mmkernels::token_contrastive_bwd", mutates_args=())
def _token_contrastive_bwd(
    tokens: Tensor,
    b: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    tokens_mask: Tensor | None,
    b_mask: Tensor | None,
    with_totals: bool,
    stats: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(tokens, b, scale, positives, row_labels, col_labels, tokens_mask, b_mask, with_totals)
    with torch.autocast(tokens.device.type, enabled=False):
        contiguous = [d.contiguous() for d in grads]
        results = _path(problem).token_contrastive_bwd(problem, TokenContrastiveStats(*stats), contiguous, needs)
    return tuple(
        like.new_empty(0) if dx is None else dx.to(like.dtype).view(like.shape)
        for dx, like in zip(results, (tokens, b, scale))
    )  # pyright: ignore[reportReturnType]


@_token_contrastive_bwd.register_fake
def _(tokens, b, scale, *rest):
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip((tokens, b, scale), rest[-1]))


def _path(problem: Problem):
    if problem.b.ndim == 3:
        return late
    return kernel if runs_triton(problem.tokens) else blockwise


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.with_totals = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[8:])


def _backward(ctx, *grads: Tensor):
    saved = ctx.saved_tensors
    tensors, stats = saved[:8], list(saved[8:])
    needs = list(ctx.needs_input_grad[:3])
    results = _token_contrastive_bwd(*tensors, ctx.with_totals, stats, list(grads[:8]), needs)
    return *(dx if needed else None for dx, needed in zip(results, needs)), *(None,) * 6


_token_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)
_token_contrastive_bwd.register_autograd(has_no_derivative(f"{OP}_stats", f"mmkernels.{OP}_stats_ref"))
