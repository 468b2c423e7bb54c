"""`mmkernels.linear_cross_entropy`: its entries in the contract test, and heads of real sizes beside eager, compile and
peers."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id
from bench.harness import CPU, DEVICE, DTYPE, ON_GPU, Bench, Claims, assert_faster, gradient_case, of_mode
from bench.measure import MIB, gemm_flops_per_s
from bench.peers import load, missing
from bench.spec import Inputs, OpSpec, Shape, shape_id
from mmkernels import linear_cross_entropy, linear_cross_entropy_ref
from mmkernels._cost import Cost

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
    )


PLAIN = _spec("plain", _make_inputs, ("hidden", "weight"))
BIAS = _spec("bias", _with_bias, ("hidden", "weight", "bias"), (*CASES, "masked"))
SMOOTHING_Z = _spec("smoothing_z", _smoothing_z, ("hidden", "weight"))
IGNORED = _spec("ignored", _ignored, ("hidden", "weight"))
ROWS = _spec("rows", _rows, ("hidden", "weight", "bias"))
SPECS = (PLAIN, BIAS, SMOOTHING_Z, IGNORED, ROWS)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PEERS = ("liger", "liger_cute", "quack", "cut_cross_entropy")
# that make their gradients in forward
EARLY = ("mmkernels", "liger", "liger_cute", "quack")


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits whole, the loss in float32, as transformers has it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def contenders() -> dict[str, Loss]:
    """By name, the peers that are here among them."""
    found: dict[str, Loss] = {
        "mmkernels": linear_cross_entropy,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    for name, impl in (("liger", "nvidia-triton"), ("liger_cute", "nvidia-cutedsl")):
        if missing(name) is None:
            found[name] = partial(_liger, impl)
    if missing("quack") is None:
        found["quack"] = load("quack").chunked_linear_cross_entropy
    if missing("cut_cross_entropy") is None:
        found["cut_cross_entropy"] = load("cut_cross_entropy").linear_cross_entropy
    return found


def _liger(impl: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """By one of its implementations, gradients summed in float32; beside the loss it gives what was not asked for."""
    call = load("liger").fused_linear_cross_entropy
    return call(hidden, weight, targets, accum_dtype=torch.float32, impl=impl)[0]


def head(
    num_rows: int, width: int, vocab: int, ignored_percent: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves hidden and weight, with logits of deviation 1, and targets of which a share is ignored."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator, device=device)
    weight = torch.randn(vocab, width, generator=generator, device=device) / width**0.5
    targets = torch.randint(vocab, (num_rows,), generator=generator, device=device)
    # an image's tokens come first, as LLaVA's do
    targets[: num_rows * ignored_percent // 100] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


SHAPES = (
    (
        {"T": 8192, "D": 4096, "V": 32000, "ignored": 0},
        {"T": 8192, "D": 4096, "V": 32000, "ignored": 50},
        {"T": 8192, "D": 4096, "V": 128256, "ignored": 0},
    )
    if ON_GPU
    else (
        {"T": 256, "D": 768, "V": 30522, "ignored": 0},
        {"T": 256, "D": 512, "V": 32000, "ignored": 0},
        {"T": 256, "D": 512, "V": 32000, "ignored": 50},
        {"T": 1024, "D": 512, "V": 32000, "ignored": 0},
    )
)
GOLD_LOGITS = 2**29  # float64 is slow on a GPU


@cache
def _gold(num_rows: int, width: int, vocab: int, ignored: int) -> Tensor:
    """dhidden in float64 of the same inputs, by the float64 path that the contract test holds to eager."""
    *leaves, targets = head(num_rows, width, vocab, ignored, DTYPE, DEVICE)
    hidden, weight = (x.detach().double() for x in leaves)
    return torch.autograd.grad(linear_cross_entropy(hidden.requires_grad_(), weight, targets), hidden)[0]


def _case(shape: Shape, contender: str, mode: str) -> Case:
    loss = contenders()[contender]
    if mode == "backward" and contender in EARLY:
        pytest.skip(f"{contender} makes its gradients in forward: both is what compares")
    num_rows, width, vocab, ignored = shape["T"], shape["D"], shape["V"], shape["ignored"]
    hidden, weight, targets = head(num_rows, width, vocab, ignored, DTYPE, DEVICE)
    return gradient_case(
        f"linear_cross_entropy {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: loss(hidden, weight, targets),
        (hidden, weight),
        mode,
        of_mode(mode, *_cost(shape, hidden.element_size())),
        rate=gemm_flops_per_s(num_rows, vocab, width, DTYPE, DEVICE),
        gold=(lambda: _gold(num_rows, width, vocab, ignored)) if num_rows * vocab <= GOLD_LOGITS else None,
    )


AXES = {"shape": SHAPES, "contender": ("mmkernels", "eager", "compile", *PEERS), "mode": MODES}
BENCHES = (Bench("linear_cross_entropy", _case, AXES, PEERS),)


def _is_faster_than_eager_in_80_mib_beside_the_gradients(ignored: int, speedup: float) -> None:
    """64 MiB of it are logits."""
    hidden, weight, targets = head(1024, 512, 32000, ignored, torch.float32, CPU)
    ours, other = (lambda loss=loss: loss(hidden, weight, targets) for loss in (linear_cross_entropy, eager))
    assert_faster(ours, other, (hidden, weight), least=speedup, rounds=5, most_bytes=80 * MIB)


CLAIMS: Claims = {
    f"{speedup} times as fast as eager in 80 MiB beside the gradients, {ignored} % ignored": partial(
        _is_faster_than_eager_in_80_mib_beside_the_gradients, ignored, speedup
    )
    for ignored, speedup in ((0, 1.5), (50, 2.5))
}
