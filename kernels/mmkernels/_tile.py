"""The elementwise work on one tile of cosines: what a CPU does between two matrix products.

`S = scale * cosines` is the same rounded product in all functions, to the bit: `exp(S - lse)` would
amplify any difference between the two passes. Float32 on a CPU goes to the native step where that is built,
everything else to ATen.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import native

# exp of less counts as zero: near the smallest normal numbers MKL's exp is thirty times slower
LOWEST = {torch.float32: -86.9, torch.float64: -708.0}
NATIVE_OUT = (torch.float32, torch.bfloat16)
# ATen takes so many entries at a time: its buffers stay in an L2 cache, and are small enough for the allocator
# to keep, where megabytes go back to the system after each tile and return page by page
BLOCK = 1 << 18


def fold_tile(
    cosines: Tensor,
    scale: float,
    row_max: Tensor,
    row_sum: Tensor,
    col_max: Tensor | None = None,
    col_sum: Tensor | None = None,
    values: Tensor | None = None,
    row_cross: Tensor | None = None,
    col_cross: Tensor | None = None,
    exclude: Tensor | None = None,
) -> None:
    """Fold `S = scale * cosines` into the online sums `sum exp(S - max)` of its rows and, where given, columns.

    Args:
        cosines: [m, n], float32 or float64, any device; unit column stride. Left as it is.
        row_max, row_sum: [m], of the same dtype, contiguous; updated in place. They start at -inf and zero.
        col_max, col_sum: [n], likewise; both or neither.
        values: [m, n], like `cosines`: `sum exp(S - max) values` is folded too.
        row_cross, col_cross: those sums, [m] and [n], which start at zero; with `values` alone.
        exclude: int64 [m], contiguous: the column of each row where S counts as -inf; outside [0, n), none.

    A NaN makes its sums NaN, and so does +inf; a row or column of -inf alone adds nothing.
    """
    if not cosines.numel():
        return
    if _runs_native(cosines):
        torch.ops.mmkernels.fold_tile(
            cosines, scale, row_max, row_sum, col_max, col_sum, values, row_cross, col_cross, exclude
        )
        return
    for rows in _blocks(cosines):
        logits = cosines[rows] * scale
        if exclude is not None:
            _fill_at(logits, exclude[rows], -torch.inf)
        work = torch.empty_like(logits)
        weighed = None if values is None else values[rows]
        cross = None if row_cross is None else row_cross[rows]
        _fold(logits, 1, row_max[rows], row_sum[rows], work, weighed, cross)
        if col_max is not None and col_sum is not None:
            _fold(logits, 0, col_max, col_sum, work, weighed, col_cross)


def grad_tile(
    cosines: Tensor,
    scale: float,
    row: tuple[Tensor, Tensor],
    col: tuple[Tensor, Tensor] | None,
    skip: Tensor | None,
    center: float | Tensor | None,
    out: Tensor,
    exclude: Tensor | None = None,
) -> Tensor:
    """`out_ij = row_coef_i exp(S_ij - row_lse_i) + col_coef_j exp(S_ij - col_lse_j)`, `S = scale * cosines`.

    Args:
        cosines: [m, n], float32 or float64, any device; unit column stride.
        row: lse and coef of the rows, [m] each, of the same dtype, contiguous.
        col: those of the columns, [n] each; None leaves the second term out.
        skip: int64 [m], the column of each row where `out` is zero; outside [0, n), none.
        center: what the returned sum takes off each cosine; None leaves the sum out (zero is returned).
        out: [m, n], written; `cosines` itself, or another tensor of its dtype or of a lower one.
        exclude: another such column.

    Returns:
        `sum out * (cosines - center)`, float64, 0-d, of `out` before it is rounded to its dtype and without
        the skipped entries. Parts of a row are summed in the dtype of `cosines`, those sums in float64.
    """
    if not cosines.numel():
        return cosines.new_zeros((), dtype=torch.float64)
    row_lse, row_coef = row
    if _runs_native(cosines) and out.dtype in NATIVE_OUT:
        number = None if center is None else float(center)
        return torch.ops.mmkernels.grad_tile(
            cosines, scale, row_lse, row_coef, *(col or (None, None)), skip, number, out, exclude
        )
    totals = [
        _grad(
            cosines[rows],
            scale,
            (row_lse[rows], row_coef[rows]),
            col,
            [x[rows] for x in (skip, exclude) if x is not None],
            center,
            out[rows],
        )
        for rows in _blocks(cosines)
    ]
    return torch.stack(totals).sum()


def info_nce_tile(cosines: Tensor, scale: float, center: float | Tensor | None) -> Tensor:
    """Symmetric InfoNCE of `S = scale * cosines`, its positives on the diagonal; `cosines` takes its own gradient.

    Args:
        cosines: [n, n], n at least 1, float32 or float64, any device; unit column stride. Overwritten.
        center: any number near the cosines' mean, for precision; None leaves the gradient out.

    Returns:
        The loss and its gradient in `scale` (zero without a center), float64 [2].
    """
    if _runs_native(cosines):
        number = None if center is None else float(center)
        return torch.ops.mmkernels.info_nce_tile(cosines, scale, number)
    size = len(cosines)
    maxima, sums = cosines.new_full((2, size), -torch.inf), cosines.new_zeros(2, size)
    fold_tile(cosines, scale, maxima[0], sums[0], maxima[1], sums[1])
    of_pairs = cosines.diagonal().clone()
    loss = ((maxima - scale * of_pairs).double() + sums.double().log()).sum() / (2 * size)
    if center is None:
        return torch.stack([loss, torch.zeros_like(loss)])
    # relative to the maxima, not to a rounded log-sum-exp
    coef = sums.reciprocal_().div_(2 * size)
    total = grad_tile(cosines, scale, (maxima[0], coef[0]), (maxima[1], coef[1]), None, center, cosines)
    cosines.diagonal().sub_(1 / size)
    cosines.mul_(scale)
    return torch.stack([loss, total - (of_pairs - center).sum(dtype=torch.float64) / size])


def sigmoid_tile(
    cosines: Tensor,
    scale: float,
    bias: float,
    row_label: Tensor,
    col_label: Tensor,
    row_loss: Tensor,
    out: Tensor | None,
) -> Tensor:
    """`loss_ij = softplus(-z_ij x_ij)`, `x = scale * cosines + bias`, z = 1 where labels are equal, else -1.

    Args:
        cosines: [m, n], float32 or float64, any device; unit column stride.
        row_label, col_label: int64 [m] and [n], contiguous.
        row_loss: [m], of the dtype of `cosines`, contiguous; each row's losses are added to it.
        out: [m, n], written: `dloss_ij / dx_ij = -z_ij sigmoid(-z_ij x_ij)`; `cosines` itself, or another tensor
            of its dtype or of a lower one. None leaves the gradient out.

    Returns:
        The sums of the losses, of `out` and of `out * cosines` (the last two zero without `out`), float64 [3],
        of `out` before it is rounded to its dtype.
    """
    if not cosines.numel():
        return cosines.new_zeros(3, dtype=torch.float64)
    if _runs_native(cosines) and (out is None or out.dtype in NATIVE_OUT):
        return torch.ops.mmkernels.sigmoid_tile(cosines, scale, bias, row_label, col_label, row_loss, out)
    totals = [
        _sigmoid(
            cosines[rows],
            scale,
            bias,
            row_label[rows, None] == col_label,
            row_loss[rows],
            out if out is None else out[rows],
        )
        for rows in _blocks(cosines)
    ]
    return torch.stack(totals).sum(0)


def _runs_native(cosines: Tensor) -> bool:
    return native.AVAILABLE and cosines.is_cpu and cosines.dtype == torch.float32


def _blocks(cosines: Tensor) -> list[slice]:
    """The tile's rows, BLOCK entries at a time."""
    rows = max(BLOCK // cosines.shape[1], 1)
    return [slice(i, i + rows) for i in range(0, len(cosines), rows)]


def _fold(
    logits: Tensor,
    dim: int,
    running_max: Tensor,
    running_sum: Tensor,
    work: Tensor,
    values: Tensor | None,
    running_cross: Tensor | None,
) -> None:
    new_max = torch.maximum(running_max, logits.amax(dim))
    shift = new_max.clamp_min(torch.finfo(new_max.dtype).min)  # -inf - -inf would be NaN
    torch.sub(logits, shift.unsqueeze(dim), out=work)
    shrink = _exp_(running_max.sub_(shift))
    running_sum.mul_(shrink).add_(_exp_(work).sum(dim))
    if values is not None and running_cross is not None:
        running_cross.mul_(shrink).add_(work.mul_(values).sum(dim))
    running_max.copy_(new_max)


def _grad(
    cosines: Tensor,
    scale: float,
    row: tuple[Tensor, Tensor],
    col: tuple[Tensor, Tensor] | None,
    skipped: list[Tensor],
    center: float | Tensor | None,
    out: Tensor,
) -> Tensor:
    row_lse, row_coef = row
    logits = cosines * scale
    grad = _exp_(logits - row_lse[:, None]).mul_(row_coef[:, None])
    if col is not None:
        col_lse, col_coef = col
        grad.addcmul_(_exp_(logits.sub_(col_lse)), col_coef)
    for columns in skipped:
        _fill_at(grad, columns, 0.0)
    if center is None:
        total = cosines.new_zeros((), dtype=torch.float64)
    else:
        products = torch.sub(cosines, center, out=logits).mul_(grad)
        for columns in skipped:
            _fill_at(products, columns, 0.0)  # where a skipped cosine is NaN
        total = products.sum(1).sum(dtype=torch.float64)
    out.copy_(grad)
    return total


def _sigmoid(cosines: Tensor, scale: float, bias: float, equal: Tensor, row_loss: Tensor, out: Tensor | None) -> Tensor:
    logits, work = cosines * scale, torch.empty_like(cosines)
    against = logits.add_(bias).mul_(_minus_where(equal, work))
    losses = _exp_(torch.abs(against, out=work).neg_()).log1p_().sum(1)
    losses += torch.clamp_min(against, 0, out=work).sum(1)
    row_loss += losses
    totals = [losses]
    if out is not None:
        grad = against.sigmoid_().mul_(_minus_where(equal, work))
        totals += [grad.sum(1), torch.mul(grad, cosines, out=work).sum(1)]
        out.copy_(grad)
    sums = torch.stack(totals).sum(1, dtype=torch.float64)
    return F.pad(sums, (0, 3 - len(totals)))


def _exp_(x: Tensor) -> Tensor:
    lowest = LOWEST[x.dtype]
    return torch.threshold_(x.clamp_min_(lowest).exp_(), 1.00001 * math.exp(lowest), 0.0)


def _minus_where(equal: Tensor, out: Tensor) -> Tensor:
    return out.copy_(equal).mul_(-2).add_(1)


def _fill_at(tile: Tensor, columns: Tensor, value: float) -> None:
    """`value` in each row's column where that lies inside the tile, without waiting for a device."""
    last = tile.shape[1] - 1
    inside = (columns >= 0) & (columns <= last)
    index = columns.clamp(0, last)[:, None]
    kept = tile.gather(1, index).masked_fill_(inside[:, None], value)
    tile.scatter_(1, index, kept)
