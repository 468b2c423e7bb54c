"""The sigmoid loss's entries in the contract test and in bench."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mmkernels._spec import Cost, Inputs, OpSpec, Shape
from mmkernels.sigmoid.op import sigmoid_loss
from mmkernels.sigmoid.reference import sigmoid_loss_ref

CASES = ("trained", "initial", "random", "steep")


def _make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """trained: positive cosine .5, scale 30, bias -12. initial: mean cosine .9, scale 10, bias -10, where SigLIP
    begins. random: no unit norm. steep: logits between -1000 and 1000."""
    generator = torch.Generator().manual_seed(seed)
    width = shape["D"]
    num_rows, num_cols = (shape.get(axis, shape.get("B", 0)) for axis in "MN")
    a, b = (torch.randn(size, width, generator=generator, dtype=torch.float64) for size in (num_rows, num_cols))
    scale, bias = {"trained": (30, -12), "initial": (10, -10), "random": (1.7, -0.3), "steep": (1000, 3)}[case]
    if case != "random":
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    if case == "initial":
        axis = F.normalize(torch.randn(width, generator=generator, dtype=torch.float64), dim=0)
        # the cosine of two such features is 1 / (1 + 1/9) = .9
        a, b = (F.normalize(axis + x / 3, dim=1) for x in (a, b))
    if case in ("trained", "steep"):
        pairs = min(num_rows, num_cols)
        b[:pairs] = F.normalize(0.5 * a[:pairs] + 0.75**0.5 * b[:pairs], dim=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "a": a.to(dtype),
        "b": b.to(dtype),
        "logit_scale": torch.tensor(scale, dtype=wide),
        "logit_bias": torch.tensor(bias, dtype=wide),
    }


def _rows(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    return _make_inputs(shape, case, dtype, seed) | {"reduction": "none"}


def _labelled(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Row i's positives are columns i and N - 1 - i and, by a label of many, a third of some rows and columns;
    some rows have none."""
    inputs = _make_inputs(shape, case, dtype, seed)
    rows, cols = torch.arange(shape["M"]), torch.arange(shape["N"])
    cols = torch.minimum(cols, shape["N"] - 1 - cols)
    # beyond int32, and of both signs
    rows, cols = (torch.where(x % 3 == 1, 7, (x - 5) << 33) for x in (rows, cols))
    return inputs | {"labels": (rows, cols), "reduction": "sum"}


def _cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    """Gradients wanted: forward makes them in float32, backward scales them."""
    num_rows, num_cols = (shape.get(axis, shape.get("B", 0)) for axis in "MN")
    features = (num_rows + num_cols) * shape["D"]
    logits = num_rows * num_cols
    product = 2 * logits * shape["D"]
    forward = Cost(3 * product, features * (element_size + 4), 2 * logits)
    return forward, Cost(0, features * (element_size + 4), 0)


def _spec(
    name: str,
    make_inputs: Callable[..., Inputs],
    shapes: tuple[Shape, ...],
    draw_shape: Callable[..., Shape],
    **bench_shapes: tuple[Shape, ...],
) -> OpSpec:
    return OpSpec(
        name=name,
        op=sigmoid_loss,
        ref=sigmoid_loss_ref,
        make_inputs=make_inputs,
        shapes=shapes,
        draw_shape=draw_shape,
        cases=CASES,
        differentiable=("a", "b", "logit_scale", "logit_bias"),
        cost=_cost,
        bench_shapes=bench_shapes,
    )


def _square(draw: Callable[[int, int], int]) -> Shape:
    return {"B": draw(1, 70), "D": draw(1, 70)}


def _rectangle(draw: Callable[[int, int], int]) -> Shape:
    return {"M": draw(1, 70), "N": draw(1, 70), "D": draw(1, 70)}


SQUARES = ({"B": 1, "D": 5}, {"B": 33, "D": 33}, {"B": 67, "D": 17})
RECTANGLES = ({"M": 1, "N": 1, "D": 1}, {"M": 7, "N": 70, "D": 3}, {"M": 65, "N": 33, "D": 33})
LOSS = _spec(
    "sigmoid_loss",
    _make_inputs,
    SQUARES,
    _square,
    cpu=tuple({"B": size, "D": 512} for size in (64, 256, 1024, 4096, 8192)),
    cuda=({"B": 8192, "D": 512}, {"B": 32768, "D": 768}, {"B": 65536, "D": 768}),
)
ROWS = _spec("sigmoid_loss[rows]", _rows, SQUARES, _square)
LABELS = _spec(
    "sigmoid_loss[labels]",
    _labelled,
    RECTANGLES,
    _rectangle,
    cpu=({"M": 1024, "N": 4096, "D": 512},),
    cuda=({"M": 4096, "N": 65536, "D": 768},),
)
SPECS = (LOSS, ROWS, LABELS)
