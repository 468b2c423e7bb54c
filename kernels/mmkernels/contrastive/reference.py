"""Eager contrastive statistics and loss, in the dtype they are given: what the other paths are held to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_stats_ref(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    symmetric: bool = True,
    teacher: tuple[Tensor, Tensor] | None = None,
    normalized: bool = False,
) -> tuple[Tensor, ...]:
    """The differentiable fields of `contrastive_stats`, in order, from the whole of `S = logit_scale * a b^T`."""
    logits = _logits(a, b, logit_scale)  # [M, N]
    none, unseen = logits.new_zeros(0), _unseen(exclude, logits)
    seen = logits if unseen is None else logits.masked_fill(unseen, -torch.inf)
    row_lse, col_lse = seen.logsumexp(1), seen.logsumexp(0) if symmetric else none
    positive = none if positives is None else _at(logits, positives)
    if teacher is None:
        return row_lse, col_lse, positive, none, none
    of_teacher = _teacher_logits(teacher, logit_scale)
    if unseen is not None:
        of_teacher = of_teacher.masked_fill(unseen, -torch.inf)
    row_cross = (of_teacher.softmax(1) * logits).sum(1)
    col_cross = (of_teacher.softmax(0) * logits).sum(0) if symmetric else none
    return row_lse, col_lse, positive, row_cross, col_cross


def contrastive_lse_ref(
    a: Tensor, b: Tensor, logit_scale: float | Tensor, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`logsumexp(S, 1)` and `logsumexp(S, 0)` of `S = logit_scale * a b^T`."""
    return contrastive_stats_ref(a, b, logit_scale, exclude=exclude)[:2]  # pyright: ignore[reportReturnType]


def contrastive_loss_ref(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    symmetric: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    normalized: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropies of the rows of `S = logit_scale * a [b; negatives]^T` and of the columns of b, as the
    papers write them, with whole matrices of targets where a target is not one index."""
    logits = _logits(a, b, logit_scale)  # [M, N]
    unseen = _unseen(exclude, logits)
    if unseen is not None:
        logits = logits.masked_fill(unseen, -torch.inf)
    all_logits = logits if negatives is None else torch.cat([logits, _logits(a, negatives, logit_scale)], 1)
    if labels is None and teacher is None:
        diagonal = torch.arange(a.shape[0], device=a.device)
        rows = _cross_entropy(all_logits, diagonal if positives is None else positives, label_smoothing)
        if not symmetric:
            return _reduce(rows, reduction)
        of_columns = logits.T if positives is None else logits.T[positives]
        return _reduce((rows + _cross_entropy(of_columns, diagonal, label_smoothing)) / 2, reduction)
    hard = _hard_targets(logits, positives, labels)  # [M, N]
    of_teacher = None
    if teacher is not None:
        of_teacher = _teacher_logits(teacher, logit_scale, negatives)
        if unseen is not None:
            num_more = of_teacher.shape[1] - unseen.shape[1]
            of_teacher = of_teacher.masked_fill(F.pad(unseen, (0, num_more)), -torch.inf)
    smoothed = {"label_smoothing": label_smoothing, "has_unseen": unseen is not None}
    rows = _soft_cross_entropy(all_logits, hard, of_teacher, alpha, **smoothed)
    if symmetric:
        batch_teacher = None if of_teacher is None else of_teacher[:, : b.shape[0]].T
        cols = _soft_cross_entropy(logits.T, hard.T, batch_teacher, alpha, **smoothed)
        if labels is not None:
            return (_reduce_counted(rows, hard, reduction) + _reduce_counted(cols, hard.T, reduction)) / 2
        of_pairs = torch.arange(a.shape[0], device=a.device) if positives is None else positives
        return _reduce((rows + cols[of_pairs]) / 2, reduction)
    return _reduce(rows, reduction) if labels is None else _reduce_counted(rows, hard, reduction)


def _logits(a: Tensor, b: Tensor, logit_scale: float | Tensor) -> Tensor:
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.reshape(()).to(a.dtype)
    return logit_scale * (a @ b.T)  # [M, N]


def _unseen(exclude: Tensor | None, logits: Tensor) -> Tensor | None:
    """Where a row does not see a column, `[M, N]`."""
    if exclude is None:
        return None
    return exclude[:, None] == torch.arange(logits.shape[1], device=logits.device)


def _teacher_logits(
    teacher: tuple[Tensor, Tensor], logit_scale: float | Tensor, negatives: Tensor | None = None
) -> Tensor:
    a, b = teacher
    with torch.no_grad():
        return _logits(a, b if negatives is None else torch.cat([b, negatives]), logit_scale)


def _at(logits: Tensor, positives: Tensor) -> Tensor:
    """`S[i, positives[i]]`; zero where there is none, -1."""
    found = logits.gather(1, positives.clamp(min=0)[:, None])[:, 0]
    return torch.where(positives < 0, 0.0, found)


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")


def _hard_targets(logits: Tensor, positives: Tensor | None, labels: tuple[Tensor, Tensor] | None) -> Tensor:
    """One where row and column are partners, `[M, N]`."""
    num_rows, num_cols = logits.shape
    columns = torch.arange(num_cols, device=logits.device)
    if labels is not None:
        return (labels[0][:, None] == labels[1]).to(logits.dtype)
    if positives is None:
        positives = columns[:num_rows]
    return (positives[:, None] == columns).to(logits.dtype)


def _soft_cross_entropy(
    logits: Tensor, hard: Tensor, teacher: Tensor | None, alpha: float, *, label_smoothing: float, has_unseen: bool
) -> Tensor:
    """Of each row of logits, the partners sharing its weight alike; without a partner, anything."""
    targets = F.pad(hard / hard.sum(1, keepdim=True).clamp(min=1), (0, logits.shape[1] - hard.shape[1]))
    targets = (1 - label_smoothing) * targets + label_smoothing / max(logits.shape[1], 1)
    if teacher is not None:
        targets = (1 - alpha) * targets + alpha * teacher.softmax(1)
    terms = targets * logits.log_softmax(1)
    if has_unseen:  # 0 * -inf is not a number
        terms = terms.masked_fill(logits == -torch.inf, 0.0)
    return -terms.sum(1)


def _reduce_counted(losses: Tensor, hard: Tensor, reduction: str) -> Tensor:
    """Over the rows that have a partner; the others are zero and are not counted."""
    counted = hard.any(1)
    losses = torch.where(counted, losses, 0.0)
    return losses.sum() / counted.sum().clamp(min=1) if reduction == "mean" else _reduce(losses, reduction)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.sum() / max(losses.numel(), 1)
    return losses.sum() if reduction == "sum" else losses
