"""The contrastive ops' entries in the contract test and in bench."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._spec import Cost, Inputs, OpSpec, Shape
from mmkernels.contrastive.op import contrastive_loss, contrastive_stats
from mmkernels.contrastive.reference import contrastive_loss_ref, contrastive_stats_ref

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


def _make_stats_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    a, b, scale = make_features(shape["M"], shape["N"], shape["D"], shape["offset"], case, seed)
    return {
        "a": a.to(dtype),
        "b": b.to(dtype),
        "logit_scale": _scale(scale, dtype),
        "offset": shape["offset"],
    }


def _make_loss_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    a, b, scale = make_features(shape["B"], shape["B"], shape["D"], 0, case, seed)
    return {"a": a.to(dtype), "b": b.to(dtype), "logit_scale": _scale(scale, dtype)}


def _scale(scale: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def _cost(num_rows: int, num_cols: int, width: int, element_size: int) -> tuple[Cost, Cost]:
    logits = num_rows * num_cols
    features = (num_rows + num_cols) * width * element_size
    stats = 4 * (2 * num_rows + num_cols)
    forward = Cost(2 * logits * width, features + stats, 2 * logits)
    return forward, Cost(3 * forward.flops, 2 * (features + stats), 2 * logits)


def _draw_stats_shape(draw: Callable[[int, int], int]) -> Shape:
    rows, extra = draw(1, 70), draw(0, 70)
    return {"M": rows, "N": rows + extra, "D": draw(1, 70), "offset": draw(0, extra)}


STATS = OpSpec(
    name="contrastive_stats",
    op=contrastive_stats,
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
    cost=lambda shape, size: _cost(shape["M"], shape["N"], shape["D"], size),
    bench_shapes={
        "cpu": ({"M": 1024, "N": 8192, "D": 512, "offset": 1024},),
        "cuda": ({"M": 4096, "N": 65536, "D": 768, "offset": 4096},),
    },
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
    cost=lambda shape, size: _cost(shape["B"], shape["B"], shape["D"], size),
    bench_shapes={
        "cpu": tuple({"B": size, "D": 512} for size in (64, 256, 1024, 4096, 8192)),
        "cuda": tuple(
            {"B": size, "D": width}
            for size in (1024, 4096, 8192, 16384, 32768, 65536)
            for width in (512, 768, 1024)
        ),
    },
)

SPECS = (STATS, LOSS)
