"""`mmkernels.token_contrastive_loss`: the token-contrastive ops' entries in the contract test, and BLIP-2's shapes
beside two eager forms and compile.

The best token is a discontinuous choice: where two tokens of a row are within rounding of each other, an op and
its reference may route a gradient to different ones, both rightly. So the data keep every best token ahead of the
next by more than float32 products can err (`separated`), which all of our paths accumulate in, whatever the
operands' dtype; what a reference in float16 or bfloat16 confuses is its own error and widens its own bound. In
the case "ties" all products are small integers, exact in every dtype and in every order of summation: there
hundreds of tokens tie, and all paths must agree that the first one wins.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id
from bench.harness import CPU, DEVICE, DTYPE, ON_GPU, Bench, Claims, assert_faster, gradient_case, of_mode
from bench.measure import MIB, gemm_flops_per_s
from bench.spec import Inputs, OpSpec, Shape, shape_id
from mmkernels import (
    token_contrastive_loss,
    token_contrastive_loss_ref,
    token_contrastive_stats,
    token_contrastive_stats_ref,
)
from mmkernels._cost import Cost

CASES = ("random", "cone", "trained", "duplicates", "ties")
# Gaps below this share of |token| |b| are widened: float32's rounding of a product of some dozen terms is a tenth.
LEAST_GAP = 64 * torch.finfo(torch.float32).eps


def make_features(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[M, Q, D]`, b `[N, D]` (or `[N, T, D]`) and the scale at which such data is met.

    random: no unit norm. cone: mean cosine .9, as at initialisation, scale 14.3. trained: scale 100, one token of
    each row with a cosine of about .3 to its column. duplicates: trained, each row and column twice. ties:
    integers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    num_rows, num_tokens, num_cols, width = (shape[axis] for axis in "MQND")
    of_cols = (num_cols, shape["T"]) if "T" in shape else (num_cols,)
    tokens, b, scale = normal(num_rows, num_tokens, width), normal(*of_cols, width), 1.7
    if case == "ties":
        tokens, b, scale = tokens.round().clamp(-1, 1), b.round().clamp(-1, 1), 1.0
        return tokens.to(dtype), b.to(dtype), _scale(scale, dtype)
    if case == "cone":
        axis, scale = F.normalize(normal(width), dim=0), 14.3
        spread = (1 / 9) ** 0.5  # the cosine of two such features is 1 / (1 + spread^2) = .9
        tokens, b = (F.normalize(axis + spread * F.normalize(x, dim=-1), dim=-1) for x in (tokens, b))
    elif case != "random":
        tokens, b, scale = F.normalize(tokens, dim=-1), F.normalize(b, dim=-1), 100.0
        near = torch.arange(num_rows) % num_cols
        tokens[:, 0] = F.normalize(
            0.3 * b.reshape(num_cols, -1, width)[near, 0] + (1 - 0.3**2) ** 0.5 * tokens[:, 0], dim=-1
        )
    tokens, b = separated(tokens, b, dtype, generator)
    if case == "duplicates":
        tokens, b = (x[torch.arange(len(x)) // 2] for x in (tokens, b))
    return tokens, b, _scale(scale, dtype)


def separated(tokens: Tensor, b: Tensor, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both in the dtype, their rows moved by some percent until `gaps` are wide enough."""
    tokens, b = tokens.to(dtype), b.to(dtype)
    for _ in range(100):
        any_close = False
        for x, other in ((tokens, b), (b, tokens)) if b.ndim == 3 else ((tokens, b),):
            close = (gaps(x, other) < LEAST_GAP).any(1)
            near = x[close].double()
            noise = torch.randn(near.shape, generator=generator, dtype=torch.float64)
            x[close] = (near + 0.03 * near.norm(dim=-1, keepdim=True) * noise).to(dtype)
            any_close |= bool(close.any())
        if not any_close:
            return tokens, b
    raise AssertionError("no tokens found whose products keep apart")


def gaps(x: Tensor, other: Tensor) -> Tensor:
    """How far the best token of each row of `x` `[M, Q, D]` is ahead of the second, for each feature of `other`,
    as a share of the largest |x| |other|."""
    x, other = x.double(), other.double().flatten(0, -2)
    if x.shape[1] == 1:
        return x.new_full((len(x), len(other)), torch.inf)
    best = (x @ other.T).topk(2, dim=1).values  # [M, 2, ...]
    largest = x.norm(dim=-1).amax(1)[:, None] * other.norm(dim=-1)
    return (best[:, 0] - best[:, 1]) / largest


def _scale(scale: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def _positives(shape: Shape, seed: int) -> Inputs:
    """Anywhere, two rows to a column now and then."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {"positives": torch.randint(shape["N"], (shape["M"],), generator=generator)}


def _some_positives(shape: Shape, seed: int) -> Inputs:
    positives = _positives(shape, seed)["positives"]
    return {"positives": torch.where(torch.arange(len(positives)) % 4 == 3, -1, positives)}


def _labels(shape: Shape, seed: int) -> Inputs:
    """About three rows and columns a label, some without a partner."""
    generator = torch.Generator().manual_seed(2000 + seed)
    num = max(shape["M"], shape["N"]) // 3 + 1
    return {"labels": tuple(torch.randint(num, (shape[axis],), generator=generator) for axis in "MN")}


def _masks(shape: Shape, seed: int) -> Inputs:
    """About a third of the tokens out, and all of the first row."""
    generator = torch.Generator().manual_seed(3000 + seed)
    mask = torch.rand(shape["M"], shape["Q"], generator=generator) > 0.3
    mask[0] = shape["M"] == 1
    of_cols = None
    if "T" in shape:
        of_cols = torch.rand(shape["N"], shape["T"], generator=generator) > 0.3
        of_cols[-1] = False
    return {"masks": (mask, of_cols)}


def cost_of_form(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    num_rows, num_tokens, num_cols, width = (shape[axis] for axis in "MQND")
    logits, per_col = num_rows * num_cols, shape.get("T", 1)
    features = (num_rows * num_tokens + num_cols * per_col) * width * element_size
    forward = Cost(2 * logits * num_tokens * per_col * width, features + 8 * (num_rows + num_cols), 2 * logits)
    return forward, Cost(3 * forward.flops, 2 * features, 2 * logits)


def _square(draw: Callable[[int, int], int]) -> Shape:
    size = draw(3, 14)
    return {"M": size, "Q": draw(1, 40), "N": size, "D": draw(2, 40)}


def _rectangle(draw: Callable[[int, int], int]) -> Shape:
    return {"M": draw(1, 8), "Q": draw(1, 40), "N": draw(3, 40), "D": draw(2, 40)}


def _late(draw: Callable[[int, int], int]) -> Shape:
    return {"M": draw(2, 8), "Q": draw(1, 12), "N": draw(3, 12), "T": draw(1, 12), "D": draw(2, 20)}


Extra = Callable[[Shape, int], Inputs]


def _spec(
    variant: str,
    shapes: tuple[Shape, ...],
    *extras: Extra,
    loss: bool = True,
    cases: tuple[str, ...] = ("random", "trained"),
    draw_shape: Callable[[Callable[[int, int], int]], Shape] = _rectangle,
    **options: object,
) -> OpSpec:
    """The loss or the statistics with some of their arguments."""

    def make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
        tokens, b, scale = make_features(shape, case, dtype, seed)
        inputs: Inputs = {"tokens": tokens, "b": b, "logit_scale": scale}
        for extra in extras:
            inputs |= extra(shape, seed)
        return inputs | options

    name = "token_contrastive_loss" if loss else "token_contrastive_stats"
    return OpSpec(
        name=f"{name}[{variant}]" if variant else name,
        op=token_contrastive_loss if loss else _differentiable_stats,
        ref=token_contrastive_loss_ref if loss else token_contrastive_stats_ref,
        make_inputs=make_inputs,
        shapes=shapes,
        draw_shape=draw_shape,
        cases=cases,
        differentiable=("tokens", "b", "logit_scale"),
    )


def _differentiable_stats(*args: Tensor, **options: object) -> tuple[Tensor, ...]:
    return token_contrastive_stats(*args, **options)[:8]  # pyright: ignore[reportArgumentType]


def _shape(rows: int, tokens: int, cols: int, width: int) -> Shape:
    return {"M": rows, "Q": tokens, "N": cols, "D": width}


LOSS = _spec("", (_shape(3, 1, 3, 5), _shape(10, 32, 10, 33)), cases=CASES, draw_shape=_square)
RECTANGLE = _spec("positives", (_shape(2, 9, 70, 17),), _positives, label_smoothing=0.1)
LABELS = _spec("labels", (_shape(7, 4, 33, 9),), _labels, label_smoothing=0.1)
ROWS = _spec("rows", (_shape(7, 4, 33, 9),), _positives, symmetric=False, reduction="none")
STATS = _spec(
    "",
    (_shape(1, 1, 3, 1), _shape(2, 40, 19, 9), _shape(5, 4, 65, 17)),
    _some_positives,
    _labels,
    _masks,
    loss=False,
    cases=CASES,
    with_totals=True,
)
LATE = _spec(
    "late",
    ({"M": 9, "Q": 5, "N": 9, "T": 4, "D": 17},),
    cases=("random", "trained", "ties"),
    draw_shape=lambda draw: {**(shape := _late(draw)), "M": shape["N"]},
)
LATE_STATS = _spec(
    "late",
    ({"M": 7, "Q": 5, "N": 10, "T": 3, "D": 9}, {"M": 1, "Q": 1, "N": 3, "T": 2, "D": 1}),
    _some_positives,
    _labels,
    _masks,
    loss=False,
    cases=("random", "cone", "ties"),
    draw_shape=_late,
    with_totals=True,
)

SPECS = (LOSS, RECTANGLE, LABELS, ROWS, STATS, LATE, LATE_STATS)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def positives_of(tokens: Tensor) -> Tensor:
    """A rank's: on the diagonal."""
    return torch.arange(len(tokens), device=tokens.device)


def ours(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return token_contrastive_loss(tokens, b, scale, positives=positives_of(tokens))


def eager(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """One product and one maximum for both directions."""
    logits = scale * (tokens.flatten(0, 1) @ b.T).unflatten(0, tokens.shape[:2]).max(1).values
    target = positives_of(tokens)
    of_rows = F.cross_entropy(logits, target)
    return (of_rows + F.cross_entropy(logits.T[: len(tokens)], target)) / 2


def lavis(tokens: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """LAVIS's Blip2Qformer: each direction has products and a maximum of its own."""
    of_images = torch.matmul(tokens.unsqueeze(1), b.unsqueeze(-1)).squeeze(-1)  # [M, N, Q]
    own = b[: len(tokens)]
    of_texts = torch.matmul(own.unsqueeze(1).unsqueeze(1), tokens.permute(0, 2, 1)).squeeze(-2)  # [M, M, Q]
    target = positives_of(tokens)
    of_rows = F.cross_entropy(scale * of_images.max(-1).values, target)
    return (of_rows + F.cross_entropy(scale * of_texts.max(-1).values, target)) / 2


def contenders() -> dict[str, Loss]:
    """By name; `torch.compile` is of the one-product form."""
    return {"mmkernels": ours, "eager": eager, "lavis": lavis, "compile": torch.compile(eager, dynamic=False)}


def features(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm leaves as after some training: a positive cosine of about .3 by one token, scale 14.3 (BLIP-2's
    temperature is .07)."""
    num_rows, num_tokens, num_cols, width = shape
    generator = torch.Generator(device).manual_seed(0)
    tokens, b = (
        F.normalize(torch.randn(*size, width, generator=generator, device=device), dim=-1)
        for size in ((num_rows, num_tokens), (num_cols,))
    )
    tokens[:, 0] = F.normalize(0.3 * b[:num_rows] + (1 - 0.3**2) ** 0.5 * tokens[:, 0], dim=-1)
    tokens, b = (x.to(dtype).requires_grad_() for x in (tokens, b))
    return tokens, b, torch.tensor(1 / 0.07, device=device, requires_grad=True)


def cost_of(shape: Shape, tokens: Tensor) -> tuple[Cost, Cost]:
    """Of the form that is run: on a CPU one of the Q products of a pair counts in the gradients."""
    forward, backward = cost_of_form(shape, tokens.element_size())
    if tokens.is_cpu:
        backward = replace(backward, flops=int((1 + 2 / shape["Q"]) * forward.flops))
    return forward, backward


DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (DTYPE,)
TIMED_SHAPES = (
    (_shape(128, 32, 8192, 256), _shape(1024, 32, 1024, 256), _shape(4096, 32, 4096, 256))
    if ON_GPU
    else (
        *(_shape(size, 32, size, 256) for size in (16, 64, 128, 256)),
        _shape(64, 32, 2048, 256),
        _shape(512, 32, 512, 256),
    )
)
COMPILED = (4096,) if ON_GPU else (256, 512)  # a compilation takes up to half a minute
# products that an eager form may store; LAVIS's form multiplies matrices by vectors, on a CPU for seconds
STORED_LIMIT = 2**31 if ON_GPU else 2**27
LAVIS_LIMIT = 2**29 if ON_GPU else 2**18

Sizes = tuple[int, int, int, int]


@cache
def _gold(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """The tokens' gradient in float64 of the same inputs, by the float64 path that the contract test holds to
    eager."""
    inputs = [x.detach().double().requires_grad_() for x in features(sizes, dtype, DEVICE)]
    return torch.autograd.grad(ours(*inputs), inputs[0])[0]


def _skip_reason(sizes: Sizes, contender: str, dtype: torch.dtype) -> str | None:
    """Why a case is left out of this machine's run, which is to stay within minutes."""
    num_rows, num_tokens, num_cols, _ = sizes
    products = num_rows * num_tokens * num_cols
    if contender == "compile" and num_rows not in COMPILED:
        return f"compiled at M = {COMPILED} only: each compilation takes up to half a minute"
    if contender != "mmkernels" and products > STORED_LIMIT:
        return f"{contender} would hold several times {products} products"
    if contender == "lavis" and products > LAVIS_LIMIT:
        return f"{products} products by LAVIS's form would take minutes, or more memory than there is"
    if ON_GPU and dtype == torch.float32 and num_rows != 1024:
        return "float32 is timed at M = 1024 only on a GPU"
    return None


def _case(shape: Shape, contender: str, dtype: torch.dtype, mode: str) -> Case:
    sizes = (shape["M"], shape["Q"], shape["N"], shape["D"])
    if reason := _skip_reason(sizes, contender, dtype):
        pytest.skip(reason)
    inputs, loss = features(sizes, dtype, DEVICE), contenders()[contender]
    return gradient_case(
        f"token_contrastive_loss {dtype_id(dtype)} {shape_id(shape)}",
        contender,
        lambda: loss(*inputs),
        inputs,
        mode,
        of_mode(mode, *cost_of(shape, inputs[0])),
        rate=gemm_flops_per_s(shape["M"] * shape["Q"], shape["N"], shape["D"], dtype, DEVICE),
        gold=lambda: _gold(sizes, dtype),
    )


AXES = {"shape": TIMED_SHAPES, "contender": ("mmkernels", "eager", "lavis", "compile"), "dtype": DTYPES, "mode": MODES}
BENCHES = (Bench("token_contrastive_loss", _case, AXES),)


def _is_twice_as_fast_as_eager_in_64_mib() -> None:
    inputs = features((1024, 32, 1024, 256), torch.float32, CPU)
    mine, other = (lambda loss=loss: loss(*inputs) for loss in (ours, eager))
    assert_faster(mine, other, inputs, least=2.0, most_bytes=64 * MIB)


CLAIMS: Claims = {"twice as fast as eager in 64 MiB": _is_twice_as_fast_as_eager_in_64_mib}
