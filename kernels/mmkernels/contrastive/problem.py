"""What a contrastive call is given and gives, and the vector arithmetic that both paths share."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._checks import accumulator

# On a GPU tiles leave sums of each of their rows and columns, of so many logits at a time: all would grow with the
# square.
MAX_LOGITS = 1 << 32
# Rows whose positives are gathered at a time: some MiB; on a GPU, which would wait for launches, four times as many.
POSITIVES_CHUNK = 1024


@dataclass(frozen=True)
class Problem:
    """Checked operands; `positives` int64 `[M]` with -1 for none; the teacher of the shapes of a and b.

    `cosines`: all of `a b^T`, `[M, N]`, which the blockwise path reads where it is given; else it computes tile by
    tile, in each pass. `exclude`: int64 `[M]`, the column that a row does not see, none where that is out of range.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    positives: Tensor | None
    teacher_a: Tensor | None
    teacher_b: Tensor | None
    symmetric: bool
    cosines: Tensor | None = None
    exclude: Tensor | None = None

    @property
    def teacher(self) -> tuple[Tensor, Tensor] | None:
        return None if self.teacher_a is None or self.teacher_b is None else (self.teacher_a, self.teacher_b)

    def of_rows(self, rows: slice) -> "Problem":
        """The same columns against some of the rows."""
        positives = None if self.positives is None else self.positives[rows]
        teacher_a = None if self.teacher_a is None else self.teacher_a[rows]
        cosines = None if self.cosines is None else self.cosines[rows]
        exclude = None if self.exclude is None else self.exclude[rows]
        return replace(self, a=self.a[rows], positives=positives, teacher_a=teacher_a, cosines=cosines, exclude=exclude)


class ContrastiveStats(NamedTuple):
    """What a contrastive loss is made of; fields that were not asked for are empty, `[0]`.

    The first five are differentiable. The rests are what rounding took from the log-sum-exps and the positives: add
    them to small differences of those.
    """

    row_lse: Tensor  # [M]
    col_lse: Tensor  # [N]
    positive: Tensor  # [M]
    row_cross: Tensor  # [M]
    col_cross: Tensor  # [N]
    row_rest: Tensor  # [M]
    col_rest: Tensor  # [N]
    teacher_row_lse: Tensor  # [M]
    teacher_col_lse: Tensor  # [N]
    positive_rest: Tensor  # [M]


class Coefficients(NamedTuple):
    """Weights in dL/dS: of exp(S - row_lse), of exp(S - col_lse), of each row's positive (applied apart from
    the tiles, so that no rounding of a tile touches it), and of the teacher's two softmaxes."""

    row: Tensor  # [M]
    col: Tensor  # [N]
    positive: Tensor  # [M]
    teacher_row: Tensor  # [M]
    teacher_col: Tensor  # [N]


def coefficients(problem: Problem, stats: ContrastiveStats, grads: list[Tensor]) -> Coefficients:
    d_row, d_col, d_positive, d_row_cross, d_col_cross = grads
    row, col = d_row * torch.exp(-stats.row_rest), d_col * torch.exp(-stats.col_rest)
    if problem.positives is None or not len(problem.b):
        positive = torch.zeros_like(row)
    else:
        place = _places(problem)
        rest = stats.positive_rest
        positive = (stats.positive - stats.row_lse).add_(rest).exp_().mul_(row)
        if problem.symmetric:
            positive += (stats.positive - stats.col_lse[place]).add_(rest).exp_().mul_(col[place])
        positive = torch.where(problem.positives < 0, 0.0, positive.add_(d_positive))
    return Coefficients(row, col, positive, d_row_cross, d_col_cross)


def of_seen(stats: ContrastiveStats, grads: list[Tensor]) -> tuple[ContrastiveStats, list[Tensor]]:
    """What a backward goes by where a row or a column may see nothing: its log-sum-exp is a constant, -inf."""
    found, of = {}, list(grads)
    for place, name in ((0, "row_lse"), (1, "col_lse"), (3, "teacher_row_lse"), (4, "teacher_col_lse")):
        lse = getattr(stats, name)
        sees_nothing = lse == -torch.inf
        found[name], of[place] = lse.masked_fill(sees_nothing, 0.0), of[place].masked_fill(sees_nothing, 0.0)
    return stats._replace(**found), of


def mean_cosine(problem: Problem) -> Tensor:
    """The mean of `a b^T`, float32 or float64, a scalar; of none, zero.

    The scale's gradient is the sum of dL/dS * (a b^T - mean) plus mean * sum of dL/dS: in a cone of features,
    where all cosines are near .9 and dL/dS sums to zero, the first sum alone would be all cancellation.
    """
    a, b, dtype = problem.a, problem.b, accumulator(problem.a.dtype)
    if not len(a) or not len(b):
        return a.new_zeros((), dtype=dtype)
    return a.mean(0, dtype=dtype).dot(b.mean(0, dtype=dtype))


def add_positives(problem: Problem, weights: Tensor, da: Tensor | None, db: Tensor | None, center: Tensor) -> Tensor:
    """Add the positives' share to the gradients `da` and `db`, not yet times the scale, where dL/dS is `weights` `[M]`.

    Returns their share of the sum of dL/dS * (a b^T - center), float64.
    """
    total = center.new_zeros((), dtype=torch.float64)
    if problem.positives is None or not len(problem.b):
        return total
    places, dtype = _places(problem), accumulator(problem.a.dtype)
    chunk = POSITIVES_CHUNK * (1 if problem.a.is_cpu else 4)
    for first in range(0, len(places), chunk):
        rows = slice(first, first + chunk)
        place, weight = places[rows], weights[rows, None]
        a, b = problem.a[rows].to(dtype), problem.b[place].to(dtype)
        total += (weight * ((a * b).sum(1, keepdim=True) - center)).sum(dtype=torch.float64)
        if da is not None:
            da[rows].addcmul_(b, weight)
        if db is not None and db.is_cuda:
            db.index_put_((place,), a * weight, accumulate=True)  # sorts: the same bits each time
        elif db is not None:
            db.index_add_(0, place, a * weight)
    return total


def grad_total(problem: Problem, grads: list[Tensor]) -> Tensor:
    """The sum of dL/dS in float64: each row's and each column's probabilities sum to one."""
    d_row, d_col, d_positive, *d_crosses = grads
    if problem.positives is not None:
        d_positive = d_positive.where(problem.positives >= 0, 0.0)  # of none the logit is a constant
    return torch.stack([d.sum(dtype=torch.float64) for d in (d_row, d_col, d_positive, *d_crosses)]).sum()


def poisoned(stats: ContrastiveStats, broken: Tensor | None) -> ContrastiveStats:
    """NaN everywhere after a broken claim."""
    if broken is None:
        return stats
    row_lse, col_lse = (torch.where(broken, torch.nan, lse) for lse in (stats.row_lse, stats.col_lse))
    return stats._replace(row_lse=row_lse, col_lse=col_lse)


def _places(problem: Problem) -> Tensor:
    """The positives, with some column in the place of none and of any that is out of range."""
    assert problem.positives is not None
    return problem.positives.clamp(0, max(problem.b.shape[0] - 1, 0))
