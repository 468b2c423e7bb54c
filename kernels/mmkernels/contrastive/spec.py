"""The contrastive ops' entries in the contract test and in bench."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._spec import Cost, Inputs, OpSpec, Shape
from mmkernels.contrastive.loss import contrastive_loss
from mmkernels.contrastive.op import contrastive_lse, contrastive_stats
from mmkernels.contrastive.reference import contrastive_loss_ref, contrastive_lse_ref, contrastive_stats_ref

CASES = ("random", "cone", "trained", "duplicates", "negative_row")


def make_features(num_rows: int, num_cols: int, width: int, offset: int, case: str, seed: int):
    """Features a `[M, D]`, b `[N, D]` and the scale at which such data is met, in float64.

    random: no unit norm. cone: mean cosine .9, as at initialisation, scale 14.3. trained: positive cosine .3,
        scale 100.
    duplicates: each feature twice, so that a positive ties with a negative. negative_row: trained, and the
        first row's every cosine is negative, so that its sums vanish under any shift but its own maximum.
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    b = torch.randn(num_cols, width, generator=generator, dtype=torch.float64)
    if case == "random":
        return a, b, 1.7
    if case == "cone":
        axis = F.normalize(torch.randn(width, generator=generator, dtype=torch.float64), dim=0)
        spread = (1 / 9) ** 0.5  # the cosine of two such features is 1 / (1 + spread^2) = .9
        return (*(F.normalize(axis + spread * F.normalize(x, dim=1), dim=1) for x in (a, b)), 14.3)
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    positives = slice(offset, offset + num_rows)
    b[positives] = F.normalize(0.3 * a + (1 - 0.3**2) ** 0.5 * b[positives], dim=1)
    if case == "duplicates":
        a, b = (x[torch.arange(len(x)) // 2] for x in (a, b))
    if case == "negative_row" and num_rows:
        b = F.normalize(torch.cat([b[:, :1].abs() + 0.8, b[:, 1:]], 1), dim=1)
        a[0] = -F.one_hot(torch.tensor(0), width).double()
    return a, b, 100.0


def _scale(scale: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def _make_lse_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    a, b, scale = make_features(shape["M"], shape["N"], shape["D"], shape.get("offset", 0), case, seed)
    return {"a": a.to(dtype), "b": b.to(dtype), "logit_scale": _scale(scale, dtype)}


def _make_stats_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """The positives a rank's: on a diagonal that begins at the offset; the teacher's features noisy copies."""
    inputs = _make_lse_inputs(shape, case, dtype, seed)
    positives = torch.arange(shape["M"]) + shape["offset"]
    return {**inputs, "positives": positives, "teacher": _teacher(inputs, seed)}


def _make_loss_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    return _make_lse_inputs({"M": shape["B"], "N": shape["B"], "D": shape["D"]}, case, dtype, seed)


def _teacher(inputs: Inputs, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)

    def beside(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return F.normalize(F.normalize(x.double(), dim=1) + 0.3 * F.normalize(noise, dim=1), dim=1).to(x.dtype)

    return beside(inputs["a"]), beside(inputs["b"])


def _shuffled(inputs: Inputs, shape: Shape, seed: int) -> Inputs:
    """Positives anywhere, two rows to a column now and then (several captions an image)."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return {"positives": torch.randint(shape["N"], (shape["M"],), generator=generator)}


def _labels(inputs: Inputs, shape: Shape, seed: int) -> Inputs:
    """About three rows and columns a label, some without a partner."""
    generator = torch.Generator().manual_seed(3000 + seed)
    num = max(shape["M"], shape["N"]) // 3 + 1
    return {"labels": tuple(torch.randint(num, (shape[axis],), generator=generator) for axis in "MN")}


def _negatives(inputs: Inputs, shape: Shape, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(4000 + seed)
    queue = torch.randn(2 * shape["N"] + 5, shape["D"], generator=generator, dtype=torch.float64)
    return {"negatives": F.normalize(queue, dim=1).to(inputs["b"].dtype)}


def _momentum(inputs: Inputs, shape: Shape, seed: int) -> Inputs:
    return {"teacher": _teacher(inputs, seed), "alpha": 0.4}


def _rectangle(draw: Callable[[int, int], int]) -> Shape:
    """Not of one row or column, where gradients that cancel to zero would make the bound zero."""
    rows = draw(2, 70)
    return {"M": rows, "N": max(rows + draw(0, 70), 4), "D": draw(4, 70)}


def _wide_rectangle(draw: Callable[[int, int], int]) -> Shape:
    """So that no column of unit vectors at scale 100 has but cosines far below zero."""
    rows = draw(24, 70)
    return {"M": rows, "N": rows + draw(0, 70), "D": draw(24, 70)}


# a rank's rows, the second's, against the gathered batch
_RANKS: Mapping[str, tuple[Shape, ...]] = {
    "cpu": ({"M": 512, "N": 4096, "D": 512, "offset": 512},),
    "cuda": ({"M": 8192, "N": 65536, "D": 768, "offset": 8192},),
}
Extra = Callable[[Inputs, Shape, int], Inputs]


def _variant(
    name: str,
    *extras: Extra,
    cases: tuple[str, ...] = ("random", "trained"),
    shapes: tuple[Shape, ...] = ({"M": 5, "N": 40, "D": 17}, {"M": 33, "N": 65, "D": 33}),
    draw_shape: Callable[[Callable[[int, int], int]], Shape] = _rectangle,
    **options: object,
) -> OpSpec:
    """contrastive_loss with some of its arguments, on rectangular features."""

    def make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
        inputs = _make_lse_inputs(shape, case, dtype, seed)
        for extra in extras:
            inputs |= extra(inputs, shape, seed)
        return inputs | options

    return OpSpec(
        name=f"contrastive_loss[{name}]",
        op=contrastive_loss,
        ref=contrastive_loss_ref,
        make_inputs=make_inputs,
        shapes=shapes,
        draw_shape=draw_shape,
        cases=cases,
        differentiable=("a", "b", "logit_scale"),
        cost=lambda shape, size: contrastive_cost(shape["M"], shape["N"], shape["D"], size),
        bench_shapes={},
    )


def _draw_stats_shape(draw: Callable[[int, int], int]) -> Shape:
    shape = _rectangle(draw)
    return {**shape, "offset": draw(0, shape["N"] - shape["M"])}


def contrastive_cost(num_rows: int, num_cols: int, width: int, element_size: int) -> tuple[Cost, Cost]:
    """Of forward, and of backward with every gradient: 1u and 3u of products, two exponentials a logit each."""
    logits = num_rows * num_cols
    features = (num_rows + num_cols) * width * element_size
    stats = 4 * (2 * num_rows + num_cols)
    forward = Cost(2 * logits * width, features + stats, 2 * logits)
    return forward, Cost(3 * forward.flops, 2 * (features + stats), 2 * logits)


STATS = OpSpec(
    name="contrastive_stats",
    op=lambda *args, **kwargs: contrastive_stats(*args, **kwargs)[:5],
    ref=contrastive_stats_ref,
    make_inputs=_make_stats_inputs,
    shapes=(
        {"M": 1, "N": 1, "D": 1, "offset": 0},
        {"M": 7, "N": 70, "D": 3, "offset": 63},
        {"M": 33, "N": 65, "D": 33, "offset": 17},
    ),
    draw_shape=_draw_stats_shape,
    cases=CASES,
    differentiable=("a", "b", "logit_scale"),
    cost=lambda shape, size: contrastive_cost(shape["M"], shape["N"], shape["D"], size),
    bench_shapes=_RANKS,
)

LSE = OpSpec(
    name="contrastive_lse",
    op=contrastive_lse,
    ref=contrastive_lse_ref,
    make_inputs=_make_lse_inputs,
    shapes=({"M": 1, "N": 1, "D": 1}, {"M": 7, "N": 70, "D": 3}, {"M": 33, "N": 65, "D": 33}),
    draw_shape=_rectangle,
    cases=("random", "trained"),
    differentiable=("a", "b", "logit_scale"),
    cost=lambda shape, size: contrastive_cost(shape["M"], shape["N"], shape["D"], size),
    bench_shapes=_RANKS,
)

LOSS = OpSpec(
    name="contrastive_loss",
    op=contrastive_loss,
    ref=contrastive_loss_ref,
    make_inputs=_make_loss_inputs,
    shapes=({"B": 1, "D": 5}, {"B": 33, "D": 33}, {"B": 67, "D": 17}),
    draw_shape=lambda draw: {"B": draw(1, 70), "D": draw(1, 70)},
    cases=CASES,
    differentiable=("a", "b", "logit_scale"),
    cost=lambda shape, size: contrastive_cost(shape["B"], shape["B"], shape["D"], size),
    bench_shapes={
        "cpu": tuple({"B": size, "D": 512} for size in (64, 256, 1024, 2048, 4096, 8192)),
        "cuda": tuple(
            {"B": size, "D": width} for size in (1024, 4096, 8192, 16384, 32768, 65536) for width in (512, 768, 1024)
        ),
    },
)

VARIANTS = (
    _variant("positives", _shuffled, reduction="none"),
    _variant("rows", _shuffled, symmetric=False, reduction="sum"),
    _variant("labels", _labels, cases=("random", "trained", "duplicates")),
    _variant("queue", _shuffled, _negatives, symmetric=False),
    _variant("teacher", _shuffled, _momentum),
    _variant("smoothing", _shuffled, _negatives, label_smoothing=0.1),
    _variant("everything", _labels, _negatives, _momentum, label_smoothing=0.1),
    _variant(
        "normalized",
        _shuffled,
        _momentum,
        normalized=True,
        cases=("trained", "cone"),
        shapes=({"M": 33, "N": 65, "D": 33},),
        draw_shape=_wide_rectangle,
    ),
)

SPECS = (STATS, LSE, LOSS, *VARIANTS)
