"""Linear cross-entropy's entries in the contract test and in bench."""

from collections.abc import Callable

import torch

from mmkernels._spec import Cost, Inputs, OpSpec, Shape
from mmkernels.linear_cross_entropy.op import linear_cross_entropy
from mmkernels.linear_cross_entropy.reference import linear_cross_entropy_ref

CASES = ("random", "trained", "steep")


def _make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """random: logits of deviation 1, targets at random. trained: the target's logit leads by about 4. steep:
    logits of deviation 40, so that one probability is all of a row, seldom the target's."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, width, vocab = shape["T"], shape["D"], shape["V"]
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) / width**0.5
    targets = torch.randint(vocab, (num_rows,), generator=generator)
    if case == "trained":
        own = weight[targets]
        hidden += 4 * own / own.square().sum(1, keepdim=True)
    if case == "steep":
        hidden *= 40
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}


def _with_bias(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """A bias as well; masked: its odd half is -inf, targets are even."""
    inputs = _make_inputs(shape, "random" if case == "masked" else case, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(shape["V"], generator=generator, dtype=torch.float64)
    if case == "masked":
        bias[1::2] = -torch.inf
        inputs["targets"] -= inputs["targets"] % 2
    return inputs | {"bias": bias.to(dtype), "reduction": "sum"}


def _smoothing_z(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    return _make_inputs(shape, case, dtype, seed) | {"label_smoothing": 0.1, "z_loss": 0.1}


def _ignored(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Every other row ignored, by an index inside the vocabulary, and those rows hold what must not count."""
    inputs = _make_inputs(shape, case, dtype, seed)
    inputs["targets"][1::2] = 0
    inputs["hidden"][1::2] *= 100
    return inputs | {"ignore_index": 0}


def _rows(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Every option at once, and a loss for each row."""
    inputs = _ignored(shape, case, dtype, seed) | _smoothing_z(shape, case, dtype, seed)
    inputs["targets"][1::3] = -1
    return inputs | {"bias": inputs["weight"][:, 0].clone(), "ignore_index": -1, "reduction": "none"}


def _cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    num_rows, width, vocab = shape["T"], shape["D"], shape["V"]
    num_rows = num_rows * (100 - shape.get("ignored", 0)) // 100
    product = 2 * num_rows * vocab * width
    operands = (num_rows + vocab) * width
    forward = Cost(product, operands * element_size, num_rows * vocab)
    return forward, Cost(2 * product, operands * (4 + element_size), num_rows * vocab)


def _draw_shape(draw: Callable[[int, int], int]) -> Shape:
    return {"T": draw(1, 70), "D": draw(1, 70), "V": draw(1, 99)}


def _spec(variant: str, make_inputs: Callable[..., Inputs], differentiable: tuple[str, ...], cases=CASES) -> OpSpec:
    return OpSpec(
        name=f"linear_cross_entropy[{variant}]",
        op=linear_cross_entropy,
        ref=linear_cross_entropy_ref,
        make_inputs=make_inputs,
        shapes=({"T": 1, "D": 1, "V": 1}, {"T": 7, "D": 3, "V": 70}, {"T": 65, "D": 33, "V": 67}),
        draw_shape=_draw_shape,
        cases=cases,
        differentiable=differentiable,
        cost=_cost,
        bench_shapes={
            "cpu": (
                {"T": 256, "D": 768, "V": 30522, "ignored": 0},
                {"T": 256, "D": 512, "V": 32000, "ignored": 0},
                {"T": 256, "D": 512, "V": 32000, "ignored": 50},
                {"T": 1024, "D": 512, "V": 32000, "ignored": 0},
            ),
            "cuda": (
                {"T": 8192, "D": 4096, "V": 32000, "ignored": 0},
                {"T": 8192, "D": 4096, "V": 32000, "ignored": 50},
                {"T": 8192, "D": 4096, "V": 128256, "ignored": 0},
            ),
        },
    )


PLAIN = _spec("plain", _make_inputs, ("hidden", "weight"))
BIAS = _spec("bias", _with_bias, ("hidden", "weight", "bias"), (*CASES, "masked"))
SMOOTHING_Z = _spec("smoothing_z", _smoothing_z, ("hidden", "weight"))
IGNORED = _spec("ignored", _ignored, ("hidden", "weight"))
ROWS = _spec("rows", _rows, ("hidden", "weight", "bias"))
SPECS = (PLAIN, BIAS, SMOOTHING_Z, IGNORED, ROWS)
