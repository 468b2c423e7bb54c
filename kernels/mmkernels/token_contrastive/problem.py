"""What a token-contrastive call is given and gives, and the vector arithmetic that all paths share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._checks import accumulator


@dataclass(frozen=True)
class Problem:
    """Checked operands: tokens `[M, Q, D]`; b `[N, D]`, or `[N, T, D]` for late interaction; `positives` int64
    `[M]` with -1 for none; labels int64 `[M]` and `[N]`; masks bool `[M, Q]` and `[N, T]`, True where a token
    counts."""

    tokens: Tensor
    b: Tensor
    scale: Tensor
    positives: Tensor | None
    row_labels: Tensor | None
    col_labels: Tensor | None
    tokens_mask: Tensor | None
    b_mask: Tensor | None
    with_totals: bool

    @property
    def shape(self) -> tuple[int, int]:
        """M and N."""
        return self.tokens.shape[0], self.b.shape[0]

    def block(self, rows: slice, cols: slice) -> "Problem":
        """Some of the rows against some of the columns; the positives counted from the first of these."""

        def part(x: Tensor | None, place: slice) -> Tensor | None:
            return None if x is None else x[place]

        return replace(
            self,
            tokens=self.tokens[rows],
            b=self.b[cols],
            positives=None if self.positives is None else self.positives[rows] - cols.start,
            row_labels=part(self.row_labels, rows),
            col_labels=part(self.col_labels, cols),
            tokens_mask=part(self.tokens_mask, rows),
            b_mask=part(self.b_mask, cols),
        )


class TokenContrastiveStats(NamedTuple):
    """What a token-contrastive loss is made of; fields that were not asked for are empty, `[0]`.

    All but the last two are differentiable. `row_rest` and `col_rest` are what rounding took from the
    log-sum-exps: add them to small differences of those.
    """

    row_lse: Tensor  # [M]
    col_lse: Tensor  # [N]
    positive: Tensor  # [M] S at each row's positive
    col_positive: Tensor  # [M] the same of the columns' S, where that is another (late interaction)
    row_total: Tensor  # [M] sums of S
    col_total: Tensor  # [N]
    row_matched: Tensor  # [M] sums of S over equal labels
    col_matched: Tensor  # [N]
    row_rest: Tensor  # [M]
    col_rest: Tensor  # [N]

    def of_rows(self, rows: slice) -> "TokenContrastiveStats":
        """The same columns' statistics beside some of the rows'."""
        names = ("row_lse", "positive", "col_positive", "row_total", "row_matched", "row_rest")
        return self._replace(**{name: getattr(self, name)[rows] for name in names})


def field_sizes(problem: Problem) -> tuple[int, ...]:
    """How long each field of the statistics is."""
    rows, cols = problem.shape
    paired = 0 if problem.positives is None else rows
    late = problem.b.ndim == 3
    total = (rows, cols) if problem.with_totals else (0, 0)
    matched = (0, 0) if problem.row_labels is None else (rows, cols)
    return (rows, cols, paired, paired if late else 0, *total, *matched, rows, cols)


class Weights(NamedTuple):
    """Weights in dL/dS: of exp(S - row_lse), of exp(S - col_lse), and of each of the linear fields."""

    row: Tensor
    col: Tensor
    positive: Tensor
    col_positive: Tensor
    row_total: Tensor
    col_total: Tensor
    row_matched: Tensor
    col_matched: Tensor

    def block(self, rows: slice, cols: slice) -> "Weights":
        of_rows = (x[rows] for x in (self.row, self.positive, self.col_positive, self.row_total, self.row_matched))
        row, positive, col_positive, row_total, row_matched = of_rows
        col, col_total, col_matched = (x[cols] for x in (self.col, self.col_total, self.col_matched))
        return Weights(row, col, positive, col_positive, row_total, col_total, row_matched, col_matched)

    def times(self, factor: Tensor) -> "Weights":
        return Weights(*(x * factor if len(x) else x for x in self))


def weights_of(stats: TokenContrastiveStats, grads: Sequence[Tensor]) -> Weights:
    """From the gradients of the differentiable fields, in order."""
    d_row, d_col, *linear = grads
    return Weights(d_row * torch.exp(-stats.row_rest), d_col * torch.exp(-stats.col_rest), *linear)


def empty_positives(problem: Problem) -> Tensor:
    """Zero where a row has no positive, NaN where its positive is out of range (a GPU's are not checked)."""
    dtype = accumulator(problem.tokens.dtype)
    if problem.positives is None:
        return problem.tokens.new_empty(0, dtype=dtype)
    wrong = (problem.positives < -1) | (problem.positives >= problem.b.shape[0])
    return torch.zeros(len(wrong), dtype=dtype, device=wrong.device).masked_fill_(wrong, torch.nan)


def label_counts(labels: Tensor, among: Tensor) -> Tensor:
    """How many of `among` `[N]` equal each label `[M]`, int64, without a matrix."""
    ordered, labels = among.sort().values, labels.contiguous()
    return torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)


def mean_cosine(problem: Problem) -> Tensor:
    """The mean of all products of a token with b, float32 or float64, a scalar; of none, zero.

    The scale's gradient is the sum of dL/dS * (cosine - mean) plus mean * sum of dL/dS: in a cone of features,
    where all cosines are near .9 and dL/dS sums to zero, the first sum alone would be all cancellation.
    """
    tokens, b, dtype = problem.tokens, problem.b, accumulator(problem.tokens.dtype)
    if 0 in problem.shape:
        return tokens.new_zeros((), dtype=dtype)
    return tokens.mean((0, 1), dtype=dtype).dot(b.flatten(0, -2).mean(0, dtype=dtype))


def grad_total(problem: Problem, grads: Sequence[Tensor]) -> Tensor:
    """The sum of dL/dS in float64: each row's and each column's probabilities sum to one."""
    (num_rows, num_cols), sums = problem.shape, [d.sum(dtype=torch.float64) for d in grads[:2]]
    if problem.positives is not None:
        has_one = problem.positives >= 0
        sums += [(d * has_one).sum(dtype=torch.float64) for d in grads[2:4] if len(d)]
    if problem.with_totals:
        sums += [d.sum(dtype=torch.float64) * size for d, size in zip(grads[4:6], (num_cols, num_rows))]
    if problem.row_labels is not None and problem.col_labels is not None:
        pairs = ((problem.row_labels, problem.col_labels), (problem.col_labels, problem.row_labels))
        sums += [(d * label_counts(*pair)).sum(dtype=torch.float64) for d, pair in zip(grads[6:8], pairs)]
    return torch.stack(sums).sum()
