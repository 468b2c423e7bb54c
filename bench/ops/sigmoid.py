"""`mmkernels.sigmoid_loss`: its entries in the contract test, and real shapes beside eager, compile and siglip-kernel.

"forward" is timed without gradients. There is no "backward" by itself: its work is done in a forward that wants
gradients.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, dtype_id
from bench.harness import CPU, DEVICE, DTYPE, ON_GPU, Bench, Claims, assert_faster, gradient_case
from bench.measure import MIB, gemm_flops_per_s
from bench.ops.contrastive import features
from bench.peers import load, missing
from bench.spec import Inputs, OpSpec, Shape, shape_id
from mmkernels import sigmoid_loss, sigmoid_loss_ref
from mmkernels._cost import Cost

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
    name: str, make_inputs: Callable[..., Inputs], shapes: tuple[Shape, ...], draw_shape: Callable[..., Shape]
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
    )


def _square(draw: Callable[[int, int], int]) -> Shape:
    return {"B": draw(1, 70), "D": draw(1, 70)}


def _rectangle(draw: Callable[[int, int], int]) -> Shape:
    return {"M": draw(1, 70), "N": draw(1, 70), "D": draw(1, 70)}


SQUARES = ({"B": 1, "D": 5}, {"B": 33, "D": 33}, {"B": 67, "D": 17})
RECTANGLES = ({"M": 1, "N": 1, "D": 1}, {"M": 7, "N": 70, "D": 3}, {"M": 65, "N": 33, "D": 33})
LOSS = _spec("sigmoid_loss", _make_inputs, SQUARES, _square)
ROWS = _spec("sigmoid_loss[rows]", _rows, SQUARES, _square)
LABELS = _spec("sigmoid_loss[labels]", _labelled, RECTANGLES, _rectangle)
SPECS = (LOSS, ROWS, LABELS)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """All logits and a matrix of signs, as open_clip's SigLipLoss has it on one process."""
    logits = scale * a @ b.T + bias
    signs = 2 * torch.eye(len(a), device=a.device, dtype=a.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def contenders() -> dict[str, Loss]:
    """By name, siglip-kernel, which takes the scale's logarithm, among them where it is here."""
    losses: dict[str, Loss] = {
        "mmkernels": sigmoid_loss,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    if missing("siglip-kernel") is None:
        fused = load("siglip-kernel").fused_siglip_loss
        losses["siglip-kernel"] = lambda a, b, scale, bias: fused(a, b, scale.log(), bias)
    return losses


def trained(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit-norm leaves as after some training: positive cosine about .3, scale 100, bias -13."""
    return *features(num_rows, width, dtype, device), torch.tensor(-13.0, device=device, requires_grad=True)


SHAPES = (
    ({"B": 8192, "D": 512}, {"B": 32768, "D": 768}, {"B": 65536, "D": 768})
    if ON_GPU
    else tuple({"B": size, "D": 512} for size in (64, 256, 1024, 4096, 8192))
)
# a compilation takes up to half a minute
COMPILED = (8192, 32768) if ON_GPU else (1024, 4096, 8192)
# eager holds several copies of [B, B]; a GPU says itself what is too much
STORED_LOGITS_LIMIT = 2**34 if ON_GPU else 2**27


@cache
def _gold(num_rows: int, width: int) -> Tensor:
    """dA in float64 of the same inputs, by the float64 path that the contract test holds to eager."""
    a, b, scale, bias = (x.detach().double().requires_grad_() for x in trained(num_rows, width, DTYPE, DEVICE))
    return torch.autograd.grad(sigmoid_loss(a, b, scale, bias), a)[0]


def _skip_reason(size: int, contender: str) -> str | None:
    """Why a case is left out of this machine's run, which is to stay within minutes."""
    if contender == "compile" and size not in COMPILED:
        return f"compiled at B = {COMPILED} only: each compilation takes up to half a minute"
    if contender in ("eager", "compile") and size**2 > STORED_LOGITS_LIMIT:
        return f"{contender} would hold several [{size}, {size}] matrices"
    return None


def _case(shape: Shape, contender: str, mode: str) -> Case:
    size, width = shape["B"], shape["D"]
    if reason := _skip_reason(size, contender):
        pytest.skip(reason)
    inputs, loss = trained(size, width, DTYPE, DEVICE), contenders()[contender]
    made, scaled = _cost(shape, inputs[0].element_size())
    cost = made + scaled
    if mode == "forward":
        cost = Cost(made.flops // 3, made.bytes_moved // 2, made.exps)
    return gradient_case(
        f"sigmoid_loss {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: loss(*inputs),
        inputs,
        mode,
        cost,
        rate=gemm_flops_per_s(size, size, width, DTYPE, DEVICE),
        gold=lambda: _gold(size, width),
    )


AXES = {"shape": SHAPES, "contender": ("mmkernels", "eager", "compile", "siglip-kernel"), "mode": ("forward", "both")}
BENCHES = (Bench("sigmoid_loss", _case, AXES, ("siglip-kernel",)),)


def _is_twice_as_fast_as_eager_in_64_mib() -> None:
    inputs = trained(8192, 512, torch.float32, CPU)
    ours, other = (lambda loss=loss: loss(*inputs) for loss in (sigmoid_loss, eager))
    assert_faster(ours, other, inputs, least=2.0, most_bytes=64 * MIB)


CLAIMS: Claims = {"twice as fast as eager in 64 MiB": _is_twice_as_fast_as_eager_in_64_mib}
