"""InfoNCE over the global batch, exact in value and in gradient on any number of data-parallel ranks."""

from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcore.losses.ranks import Header, Layout, agree, gather_rows, global_mean, header, world_size_of
from mmcore.losses.shards import GATHER_LIMIT_BYTES, shards_of
from mmcore.losses.statistics import Columns, GlobalStats
from mmcore.nn.batch_norm import all_sum
from mmkernels import contrastive_loss
from mmkernels.pieces import (
    ContrastiveProblem,
    ContrastiveStats,
    LinearMeans,
    Match,
    Options,
    accumulator,
    broken_claim,
    checked_inputs,
    first_match,
    gives_nan,
    pair_losses,
    reduce,
)

OP = "global_contrastive_loss"


class _Inputs(NamedTuple):
    a: Tensor  # [m, D]
    b: Tensor  # [n, D]
    scale: Tensor  # [], float64
    labels: tuple[Tensor, Tensor] | None
    teacher: tuple[Tensor, Tensor] | None
    negatives: Tensor | None
    broken: Tensor | None


def global_contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    symmetric: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    normalized: bool = False,
    group: dist.ProcessGroup | None = None,
    gather_limit_bytes: int = GATHER_LIMIT_BYTES,
) -> Tensor:
    """`mmkernels.contrastive_loss` of the rows of all ranks: with S = logit_scale * A B^T of the global batch,
    `(mean_i CE(S_i, i) + mean_j CE(S_:j, j)) / 2` and its generalisations.

    Every rank gets the same value. Gradients are scaled so that the *mean* over ranks, which is what DDP and
    DeepSpeed form, equals the gradient that one process would compute on the whole batch, for the encoders and
    for `logit_scale` alike. Each rank computes its rows against all columns, for both directions at once: 4u/W
    FLOP of u = 2 N^2 D, vectors of N float64, and either one all-gather of `b` in its own dtype and one
    reduce-scatter of its gradient in float32, or a ring of transfers that hide behind the computation.

    Args:
        a: features `[m, D]` of this rank's rows, float32, float16, bfloat16 or float64. Ranks may have different
            numbers of rows, or none.
        b: features `[n, D]` of their partners, same dtype and device; n = m but for `labels`. The global batch is
            the ranks' rows in the order of the ranks.
        logit_scale: the multiplier itself, the same on every rank: a finite float or a tensor of one element.
        symmetric: False leaves the columns' half out.
        labels: int64 `[m]` and `[n]`: equal labels are positives, on whichever ranks they are.
        negatives: features `[K, D]`, constants, the same queue on every rank: appended to the columns once.
        teacher: momentum features `[m, D]` and `[n, D]` of the same rows, constants, mixed in by `alpha`.
        alpha: from 0 to 1, above 0 only with a teacher.
        label_smoothing: from 0 to 1.
        normalized: the claim of unit norm, see `mmkernels.contrastive_stats`.
        group: the data-parallel process group; None = the default one, or one process where none is set up.
        gather_limit_bytes: above so many bytes of gathered `b` and teacher the ring is taken, in which no rank
            holds more than two ranks' shares of them at a time.

    Returns:
        The loss, a scalar, float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype, device, index, scale or combination of arguments on any rank, or ranks
            that differ in width, dtype or settings: on every rank.

    Reference: `mmkernels.contrastive_loss_ref` on the concatenated ranks. Papers: CLIP (arXiv:2103.00020), Inf-CL
    (arXiv:2410.17243).
    """
    options = Options(symmetric, alpha, label_smoothing, normalized)
    if world_size_of(group) == 1:
        return contrastive_loss(
            a, b, logit_scale, labels=labels, negatives=negatives, teacher=teacher, **asdict(options)
        )

    def check() -> tuple[_Inputs, Header]:
        inputs = _checked(a, b, logit_scale, labels, negatives, teacher, options)
        more = {
            "teacher": "none" if teacher is None else "given",
            "negatives": "none" if negatives is None else f"{len(negatives)} rows",
        }
        of_inputs = {"a": inputs.a, "b": inputs.b, "logit_scale": inputs.scale}
        return inputs, header(OP, of_inputs, labels, gather_limit_bytes, **more, **asdict(options))

    inputs, layout = agree(OP, group, a.device, check)
    with torch.autocast(a.device.type, enabled=False):
        match, columns = _columns(inputs, layout, options, gather_limit_bytes)
        *stats, target = GlobalStats.apply(inputs.a, inputs.b, inputs.scale, columns)  # pyright: ignore[reportGeneralTypeIssues]
        means = _linear_means(inputs, layout, match, target, options)
        rows, cols = pair_losses(ContrastiveStats(*stats), match, means, options)
        loss = reduce(rows, match.num_rows, "mean")
        if cols is not None:
            loss = (loss + reduce(cols, match.num_cols, "mean")) / 2
        return global_mean(loss, group).to(accumulator(inputs.a.dtype))


def _checked(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    labels: tuple[Tensor, Tensor] | None,
    negatives: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    options: Options,
) -> _Inputs:
    a, b, scale, teacher, negatives = checked_inputs(a, b, logit_scale, None, labels, negatives, teacher, options)
    a, b, scale = a.contiguous(), b.contiguous(), scale.reshape(()).double()
    broken = None
    if options.normalized:
        broken = broken_claim(ContrastiveProblem(a, b, scale, None, *(teacher or (None, None)), False))
        if negatives is not None:
            of_negatives = broken_claim(ContrastiveProblem(negatives, negatives, scale, None, None, None, False))
            broken = None if broken is None or of_negatives is None else broken | of_negatives
    return _Inputs(a, b, scale, labels, teacher, negatives, broken)


def _columns(inputs: _Inputs, layout: Layout, options: Options, gather_limit_bytes: int) -> tuple[Match, Columns]:
    """Each row's positives among all columns, and what its statistics are made from."""
    labels, weights = None, None
    if inputs.labels is None:
        own = layout.rows_of(layout.rank)
        first = torch.arange(own.start, own.stop, device=inputs.a.device)
        match = Match(first, None, None, None, sum(layout.rows), sum(layout.rows))
    else:
        all_rows = gather_rows(inputs.labels[0], layout.rows, layout.group)
        all_cols = gather_rows(inputs.labels[1], layout.cols, layout.group)
        first, cols = first_match(inputs.labels[0], all_cols)
        rows = first_match(inputs.labels[0], all_rows)[1]
        num_rows, num_cols = ((first_match(x, y)[1] > 0).sum() for x, y in ((all_rows, all_cols), (all_cols, all_rows)))
        labels = (inputs.labels[0], all_cols)
        match = Match(first, labels, cols, rows, num_rows, num_cols)
        place, count = first_match(all_cols, all_cols)
        is_first = place == torch.arange(len(place), device=place.device)
        weights = (1 / count.double() - is_first.double()).to(accumulator(inputs.a.dtype))
    broken = inputs.broken
    if broken is not None:
        broken = broken.float()
        dist.all_reduce(broken, op=dist.ReduceOp.MAX, group=layout.group)
        broken = broken > 0
    teacher_a, *teacher_b = inputs.teacher or (None,)
    shards = shards_of(layout, [inputs.b, *teacher_b], gather_limit_bytes)
    of_rows = first, labels, weights, inputs.negatives, teacher_a
    is_normalized = options.normalized and gives_nan(inputs.a)
    return match, Columns(layout, shards, *of_rows, options.symmetric, is_normalized, broken)


def _linear_means(inputs: _Inputs, layout: Layout, match: Match, target: Tensor, options: Options) -> LinearMeans:
    """What `mmkernels.contrastive` takes from means of features, these over all ranks; float64."""
    dtype = accumulator(inputs.a.dtype)
    a, b, scale, group = inputs.a.to(dtype), inputs.b.to(dtype), inputs.scale, layout.group
    of_positives = row = col = None
    if match.labels is not None:
        of_positives = scale * (a * target).sum(1).double()
    if options.label_smoothing > 0:
        total, count = all_sum(b.sum(0), group), sum(layout.cols)
        if inputs.negatives is not None:
            total, count = total + inputs.negatives.to(dtype).sum(0), count + len(inputs.negatives)
        row = scale * (a @ (total / max(count, 1))).double()
        if options.symmetric:
            a_mean = all_sum(a.sum(0), group) / max(sum(layout.rows), 1)
            own = layout.cols_of(layout.rank)
            of_cols = all_sum(F.pad(b @ a_mean, (own.start, sum(layout.cols) - own.stop)), group)
            col = scale * match.pool(of_cols).double()
    return LinearMeans(of_positives, row, col)
