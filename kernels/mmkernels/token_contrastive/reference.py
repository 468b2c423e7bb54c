"""Eager token-contrastive statistics and loss, in the dtype they are given: what the other paths are held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

Masks = tuple[Tensor | None, Tensor | None]


def token_contrastive_stats_ref(
    tokens: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    masks: Masks | None = None,
    with_totals: bool = False,
) -> tuple[Tensor, ...]:
    """The differentiable fields of `token_contrastive_stats`, in order, from the whole of S."""
    of_rows, of_cols = _logits(tokens, b, logit_scale, masks)  # [M, N] each
    none = of_rows.new_zeros(0)
    positive = col_positive = row_matched = col_matched = none
    if positives is not None:
        positive = _at(of_rows, positives)
        col_positive = _at(of_cols, positives) if b.ndim == 3 else none
    if labels is not None:
        equal = labels[0][:, None] == labels[1]
        row_matched = torch.where(equal, of_rows, 0).sum(1)
        col_matched = torch.where(equal, of_cols, 0).sum(0)
    return (
        of_rows.logsumexp(1),
        of_cols.logsumexp(0),
        positive,
        col_positive,
        of_rows.sum(1) if with_totals else none,
        of_cols.sum(0) if with_totals else none,
        row_matched,
        col_matched,
    )


def token_contrastive_loss_ref(
    tokens: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    symmetric: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    masks: Masks | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropies of the rows and columns of S, as the papers write them."""
    of_rows, of_cols = _logits(tokens, b, logit_scale, masks)
    if labels is None:
        pairs = torch.arange(tokens.shape[0], device=tokens.device)
        rows = _smoothed(of_rows, pairs if positives is None else positives, label_smoothing)
        # several rows may share a column: a column's cross-entropy is that of each such pair
        cols = _smoothed(of_cols.T if positives is None else of_cols.T[positives], pairs, label_smoothing)
        return _reduce((rows + cols) / 2 if symmetric else rows, torch.ones_like(pairs), reduction)
    hard = labels[0][:, None] == labels[1]  # [M, N]
    has_col, has_row = hard.any(1), hard.any(0)
    rows = torch.where(has_col, _shared(of_rows, hard, label_smoothing), 0.0)
    if not symmetric:
        return _reduce(rows, has_col, reduction)
    cols = torch.where(has_row, _shared(of_cols.T, hard.T, label_smoothing), 0.0)
    if reduction == "none":
        return (rows + cols) / 2
    return (_reduce(rows, has_col, reduction) + _reduce(cols, has_row, reduction)) / 2


def _logits(tokens: Tensor, b: Tensor, logit_scale: float | Tensor, masks: Masks | None) -> tuple[Tensor, Tensor]:
    """S as the rows see it and as the columns see it, `[M, N]` each; the same for `b` `[N, D]`."""
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.reshape(()).to(tokens.dtype)
    (num_rows, num_tokens, width), num_cols = tokens.shape, b.shape[0]
    tokens_mask, b_mask = masks or (None, None)
    flat = b.reshape(-1, width)
    cosines = (tokens.reshape(-1, width) @ flat.T).view(num_rows, num_tokens, len(flat))  # [M, Q, N * T]
    best = _masked_max(cosines, None if tokens_mask is None else tokens_mask[:, :, None], 1)  # [M, N * T]
    if b.ndim == 2:
        return logit_scale * best, logit_scale * best
    late = cosines.unflatten(2, b.shape[:2])  # [M, Q, N, T]
    of_tokens = _masked_max(late, None if b_mask is None else b_mask[None, None], 3)  # [M, Q, N]
    of_rows = _masked_mean(of_tokens, None if tokens_mask is None else tokens_mask[:, :, None], 1)
    of_cols = _masked_mean(best.view(num_rows, num_cols, -1), None if b_mask is None else b_mask[None], 2)
    return logit_scale * of_rows, logit_scale * of_cols


def _masked_max(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """The first of the largest takes the gradient; of nothing, zero."""
    if mask is None:
        return x.max(dim).values
    best = torch.where(mask, x, -torch.inf).max(dim).values
    return torch.where(mask.any(dim), best, 0.0)


def _masked_mean(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    if mask is None:
        return x.mean(dim)
    return torch.where(mask, x, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)


def _at(logits: Tensor, positives: Tensor) -> Tensor:
    """`S[i, positives[i]]`; zero where there is none, -1."""
    found = logits.gather(1, positives.clamp(min=0)[:, None])[:, 0]
    return torch.where(positives < 0, 0.0, found)


def _smoothed(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")


def _shared(logits: Tensor, hard: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of each row of logits, its partners sharing the target alike."""
    targets = hard.to(logits.dtype)
    targets = targets / targets.sum(1, keepdim=True).clamp(min=1)
    targets = (1 - label_smoothing) * targets + label_smoothing / max(logits.shape[1], 1)
    return -(targets * logits.log_softmax(1)).sum(1)


def _reduce(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.sum() / counted.sum().clamp(min=1)
    return losses.sum() if reduction == "sum" else losses
