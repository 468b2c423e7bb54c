"""`mmkernels.contrastive_loss`: its entries in the contract test, and real shapes beside eager, open_clip's form,
compile and peers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id
from bench.harness import CPU, DEVICE, DTYPE, ON_GPU, Bench, Claims, assert_faster, gradient_case, of_mode
from bench.measure import MIB, gemm_flops_per_s
from bench.peers import load, missing
from bench.spec import Inputs, OpSpec, Shape, shape_id
from mmkernels import contrastive_loss, contrastive_loss_ref
from mmkernels._cost import Cost, contrastive_cost
from mmkernels._products import CHOICES
from mmkernels.contrastive.op import logits_are_kept

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


def make_pair(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    a, b, scale = make_features(shape["M"], shape["N"], shape["D"], shape.get("offset", 0), case, seed)
    return {"a": a.to(dtype), "b": b.to(dtype), "logit_scale": _scale(scale, dtype)}


def _make_loss_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    return make_pair({"M": shape["B"], "N": shape["B"], "D": shape["D"]}, case, dtype, seed)


def teacher_of(inputs: Inputs, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)

    def beside(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return F.normalize(F.normalize(x.double(), dim=1) + 0.3 * F.normalize(noise, dim=1), dim=1).to(x.dtype)

    return beside(inputs["a"]), beside(inputs["b"])


def _shuffled(inputs: Inputs, shape: Shape, seed: int) -> Inputs:
    """Positives anywhere, two rows to a column now and then (several captions an image)."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return {"positives": torch.randint(shape["N"], (shape["M"],), generator=generator)}


def _exclude(inputs: Inputs, shape: Shape, seed: int) -> Inputs:
    """A column that is no positive, of some rows none or one that is not there."""
    generator = torch.Generator().manual_seed(5000 + seed)
    rows, cols = shape["M"], shape["N"]
    drawn = torch.randint(1, cols, (rows,), generator=generator)
    if "labels" in inputs:
        drawn = drawn.where(inputs["labels"][0] != inputs["labels"][1][drawn], -1)
    else:
        drawn = (inputs["positives"] + drawn) % cols
    drawn[::7], drawn[3::7] = -1, cols
    return {"exclude": drawn}


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
    return {"teacher": teacher_of(inputs, seed), "alpha": 0.4}


def rectangle(draw: Callable[[int, int], int]) -> Shape:
    """Not of one row or column, where gradients that cancel to zero would make the bound zero."""
    rows = draw(2, 70)
    return {"M": rows, "N": max(rows + draw(0, 70), 4), "D": draw(4, 70)}


def _wide_rectangle(draw: Callable[[int, int], int]) -> Shape:
    """So that no column of unit vectors at scale 100 has but cosines far below zero."""
    rows = draw(24, 70)
    return {"M": rows, "N": rows + draw(0, 70), "D": draw(24, 70)}


Extra = Callable[[Inputs, Shape, int], Inputs]


def _variant(
    name: str,
    *extras: Extra,
    cases: tuple[str, ...] = ("random", "trained"),
    shapes: tuple[Shape, ...] = ({"M": 5, "N": 40, "D": 17}, {"M": 33, "N": 65, "D": 33}),
    draw_shape: Callable[[Callable[[int, int], int]], Shape] = rectangle,
    **options: object,
) -> OpSpec:
    """contrastive_loss with some of its arguments, on rectangular features."""

    def make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
        inputs = make_pair(shape, case, dtype, seed)
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
)

UNSEEN = _variant("exclude", _shuffled, _exclude, cases=("random", "trained", "cone"))
VARIANTS = (
    _variant("positives", _shuffled, reduction="none"),
    _variant("rows", _shuffled, symmetric=False, reduction="sum"),
    _variant("labels", _labels, cases=("random", "trained", "duplicates")),
    _variant("queue", _shuffled, _negatives, symmetric=False),
    _variant("teacher", _shuffled, _momentum),
    _variant("smoothing", _shuffled, _negatives, label_smoothing=0.1),
    UNSEEN,
    _variant("exclude, everything", _labels, _negatives, _momentum, _exclude, cases=("random",)),
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

SPECS = (LOSS, *VARIANTS)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """One product, as OpenAI's CLIP and transformers have it."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def open_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Two products, as open_clip's ClipLoss has it on one process."""
    per_image, per_text = scale * a @ b.T, scale * b @ a.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def inf_cl(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Inf-CL's one-sided Triton loss of each row, once a direction, in the largest heads that it knows."""
    cal_flash_loss, head = load("inf_cl").cal_flash_loss, 256 if a.shape[1] % 256 == 0 else 128
    rows, cols = (cal_flash_loss(*x, scale=scale, head_dim=head).mean() for x in ((a, b), (b, a)))
    return (rows + cols) / 2


def cut_cross_entropy(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Apple's linear cross-entropy, once a direction, without its skipping of small probabilities."""
    linear_cross_entropy = load("cut_cross_entropy").linear_cross_entropy
    target = torch.arange(len(a), device=a.device)
    scaled = (scale * a).to(a.dtype)
    rows = linear_cross_entropy(scaled, b, target, filter_eps=None)
    return (rows + linear_cross_entropy((scale * b).to(b.dtype), a, target, filter_eps=None)) / 2


def sentence_transformers(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """CachedMultipleNegativesRankingLoss of both directions, which is eager, 1,024 rows at a time."""
    loss = load("sentence_transformers").CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),
        scale=1.0,
        similarity_fct=lambda x, y: scale * x @ y.T,
        mini_batch_size=1024,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return loss.calculate_loss([[a], [b]])


PEERS: Mapping[str, Loss] = {
    "inf_cl": inf_cl,
    "cut_cross_entropy": cut_cross_entropy,
    "sentence_transformers": sentence_transformers,
}


def contenders() -> dict[str, Loss]:
    """By name, the peers that are here among them; `torch.compile` is of the one-product form."""
    return {name: loss for name, loss in PEERS.items() if missing(name) is None} | {
        "mmkernels": contrastive_loss,
        "eager": eager,
        "open_clip": open_clip,
        "compile": torch.compile(eager, dynamic=False),
    }


def features(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm leaves as after some training: positive cosine about .3, scale 100."""
    generator = torch.Generator(device).manual_seed(0)
    a, noise = (F.normalize(torch.randn(num_rows, width, generator=generator, device=device), dim=-1) for _ in range(2))
    b = F.normalize(0.3 * a + (1 - 0.3**2) ** 0.5 * noise, dim=-1)
    a, b = (x.to(dtype).requires_grad_() for x in (a, b))
    return a, b, torch.tensor(100.0, device=device, requires_grad=True)


def cost_of(a: Tensor, num_cols: int, learned: float = 1.0) -> tuple[Cost, Cost]:
    """`contrastive_cost` of the form that is run: the logits again where they are not kept, the gradients of the rows,
    and those of a share of the columns."""
    forward, backward = contrastive_cost(len(a), num_cols, a.shape[1], a.element_size())
    products = (not logits_are_kept(a, num_cols)) + 1 + learned
    return forward, replace(backward, flops=int(products * forward.flops))


DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (DTYPE,)
SHAPES = (
    tuple({"B": size, "D": width} for size in (1024, 4096, 8192, 16384, 32768, 65536) for width in (512, 768, 1024))
    if ON_GPU
    else tuple({"B": size, "D": 512} for size in (64, 256, 1024, 2048, 4096, 8192))
)
# a compilation takes up to half a minute
COMPILED = (8192, 32768) if ON_GPU else (1024, 4096, 8192)
FULL_PRECISION_ON_CUDA = (8192, 768)
# eager holds several copies of [B, B]; a GPU says itself what is too much
STORED_LOGITS_LIMIT = 2**34 if ON_GPU else 2**27


@cache
def _gold(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """dA in float64 of the same inputs, by the float64 path that the contract test holds to eager."""
    a, b, scale = (x.detach().double().requires_grad_() for x in features(num_rows, width, dtype, DEVICE))
    return torch.autograd.grad(contrastive_loss(a, b, scale), a)[0]


def _skip_reason(size: int, width: int, contender: str, dtype: torch.dtype) -> str | None:
    """Why a case is left out of this machine's run, which is to stay within minutes."""
    if contender == "compile" and (size not in COMPILED or (ON_GPU and width != 768)):
        return f"compiled at B = {COMPILED} only: each compilation takes up to half a minute"
    if contender != "mmkernels" and size**2 > STORED_LOGITS_LIMIT:
        return f"{contender} would hold several [{size}, {size}] matrices"
    if ON_GPU and dtype == torch.float32 and (size, width) != FULL_PRECISION_ON_CUDA:
        return f"float32 is timed at (B, D) = {FULL_PRECISION_ON_CUDA} only on a GPU"
    return None


def _case(shape: Shape, contender: str, dtype: torch.dtype, mode: str) -> Case:
    size, width = shape["B"], shape["D"]
    if reason := _skip_reason(size, width, contender, dtype):
        pytest.skip(reason)
    inputs, loss = features(size, width, dtype, DEVICE), contenders()[contender]
    return gradient_case(
        f"contrastive_loss {dtype_id(dtype)} {shape_id(shape)}",
        contender,
        lambda: loss(*inputs),
        inputs,
        mode,
        of_mode(mode, *cost_of(inputs[0], size)),
        rate=gemm_flops_per_s(size, size, width, dtype, DEVICE),
        gold=lambda: _gold(size, width, dtype),
    )


AXES = {
    "shape": SHAPES,
    "contender": ("mmkernels", "eager", "open_clip", "compile", *PEERS),
    "dtype": DTYPES,
    "mode": MODES,
}
BENCHES = (Bench("contrastive_loss", _case, AXES, tuple(PEERS)),)


def _is_well_ahead_of_eager_in_64_mib() -> None:
    inputs = features(8192, 512, torch.float32, CPU)
    ours, other = (lambda loss=loss: loss(*inputs) for loss in (contrastive_loss, eager))
    assert_faster(ours, other, inputs, least=1.6, most_bytes=64 * MIB)


def _is_near_its_products_in_bfloat16() -> None:
    inputs = features(8192, 512, torch.bfloat16, CPU)
    ours, other = (lambda loss=loss: loss(*inputs) for loss in (contrastive_loss, eager))
    rate = gemm_flops_per_s(8192, 8192, 512, torch.bfloat16, CPU)
    # eager's three products are as fast; what is left is what it does between them
    seconds = assert_faster(ours, other, inputs, least=1.25, most_bytes=64 * MIB)
    assert seconds * rate <= 2.5 * 4 * 2 * 8192**2 * 512


CLAIMS: Claims = {"well ahead of eager in 64 MiB": _is_well_ahead_of_eager_in_64_mib}
if CHOICES["bfloat16"].way != "widened":
    CLAIMS["in bfloat16 ahead of eager, near its products, in 64 MiB"] = _is_near_its_products_in_bfloat16
