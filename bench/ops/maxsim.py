"""`mmkernels.maxsim`: its entries in the contract test, and ColBERT's and ColPali's shapes beside eager and compile.

Best tokens are kept ahead of the next as `bench.ops.token_contrastive` says.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id
from bench.harness import CPU, DEVICE, DTYPE, ON_GPU, Bench, Claims, assert_faster, gradient_case, of_mode
from bench.measure import gemm_flops_per_s
from bench.ops.token_contrastive import make_features
from bench.spec import Inputs, OpSpec, Shape, shape_id
from mmkernels import maxsim, maxsim_ref
from mmkernels._cost import Cost


def _inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    d, q, _ = make_features(
        {"M": shape["N"], "Q": shape["Ld"], "N": shape["B"], "T": shape["Lq"], "D": shape["D"]}, case, dtype, seed
    )
    return {"q": q, "d": d}


def _masked(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """About a third of the tokens out, all of the last query, and all of the last document."""
    generator = torch.Generator().manual_seed(1000 + seed)
    q_mask, d_mask = (torch.rand(shape[x], shape[y], generator=generator) > 0.3 for x, y in (("B", "Lq"), ("N", "Ld")))
    q_mask[-1], d_mask[-1] = shape["B"] == 1, shape["N"] == 1
    return _inputs(shape, case, dtype, seed) | {"q_mask": q_mask, "d_mask": d_mask}


def _draw_shape(draw: Callable[[int, int], int]) -> Shape:
    return {"B": draw(1, 5), "Lq": draw(1, 9), "N": draw(1, 6), "Ld": draw(1, 40), "D": draw(2, 40)}


def _spec(name: str, make_inputs: Callable[..., Inputs]) -> OpSpec:
    return OpSpec(
        name=name,
        op=maxsim,
        ref=maxsim_ref,
        make_inputs=make_inputs,
        shapes=(
            {"B": 1, "Lq": 1, "N": 1, "Ld": 1, "D": 2},
            {"B": 3, "Lq": 5, "N": 4, "Ld": 33, "D": 33},
            {"B": 5, "Lq": 13, "N": 7, "Ld": 35, "D": 70},
        ),
        draw_shape=_draw_shape,
        cases=("random", "trained", "duplicates", "ties"),
        differentiable=("q", "d"),
    )


PLAIN = _spec("maxsim", _inputs)
MASKED = _spec("maxsim[masked]", _masked)
SPECS = (PLAIN, MASKED)


def _cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    """Backward is a gather for the queries, and one product's worth for the documents."""
    rows, cols, width = shape["B"] * shape["Lq"], shape["N"] * shape["Ld"], shape["D"]
    places, features = 2 * rows * shape["N"], (rows + cols) * width * element_size
    product = 2 * rows * cols * width
    return Cost(product, features + places), Cost(product, 2 * features + places)


SHAPES = (
    (
        {"B": 128, "Lq": 32, "N": 1024, "Ld": 180, "D": 128},
        {"B": 64, "Lq": 32, "N": 64, "Ld": 1030, "D": 128},
        {"B": 256, "Lq": 77, "N": 256, "Ld": 196, "D": 256},
    )
    if ON_GPU
    else ({"B": 8, "Lq": 32, "N": 16, "Ld": 180, "D": 128}, {"B": 32, "Lq": 32, "N": 64, "Ld": 180, "D": 128})
)
Scores = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(q: Tensor, d: Tensor, d_mask: Tensor) -> Tensor:
    """As the field writes it."""
    products = torch.einsum("bik,ntk->bnit", q, d)
    return products.masked_fill(~d_mask[:, None, :], -1e4).max(3).values.sum(2)


CONTENDERS: dict[str, Callable[[], Scores]] = {
    "mmkernels": lambda: lambda q, d, d_mask: maxsim(q, d, d_mask=d_mask),
    "eager": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
}


def tokens(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves of unit norm for queries and documents, and a mask of documents of 60 to 100 % of the length."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (shape["B"], shape["Lq"], shape["D"]), (shape["N"], shape["Ld"], shape["D"])
    q, d = (F.normalize(torch.randn(size, generator=generator, device=device), dim=-1).to(dtype) for size in sizes)
    lengths = torch.linspace(0.6, 1.0, shape["N"], device=device) * shape["Ld"]
    mask = torch.arange(shape["Ld"], device=device) < lengths[:, None]
    return q.requires_grad_(), d.requires_grad_(), mask


def loss(scores: Tensor) -> Tensor:
    """Each query's own document against those of the batch."""
    return F.cross_entropy(scores.float() / 0.5, torch.arange(len(scores), device=scores.device))


def _case(shape: Shape, contender: str, mode: str) -> Case:
    q, d, mask = tokens(shape, DTYPE, DEVICE)
    scores = CONTENDERS[contender]()

    def gold() -> Tensor:
        leaf, wide = q.detach().double().requires_grad_(), d.detach().double()
        return torch.autograd.grad(loss(maxsim(leaf, wide, d_mask=mask).double()), leaf)[0]

    return gradient_case(
        f"maxsim {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: loss(scores(q, d, mask)),
        (q, d),
        mode,
        of_mode(mode, *_cost(shape, q.element_size())),
        rate=gemm_flops_per_s(shape["B"] * shape["Lq"], shape["N"] * shape["Ld"], shape["D"], DTYPE, DEVICE),
        gold=gold,
    )


BENCHES = (Bench("maxsim", _case, {"shape": SHAPES, "contender": tuple(CONTENDERS), "mode": MODES}),)


def _is_faster_than_eager() -> None:
    q, d, mask = tokens(SHAPES[-1], torch.float32, CPU)
    assert_faster(lambda: loss(maxsim(q, d, d_mask=mask)), lambda: loss(eager(q, d, mask)), (q, d), least=1.5)


CLAIMS: Claims = {"faster than eager at 32 queries and 64 documents": _is_faster_than_eager}
