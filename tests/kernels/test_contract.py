"""The contract of every enrolled op, on each of its paths.

On the CPU this file holds the blockwise path to it, and under TRITON_INTERPRET=1 (see test_interpreted.py)
the Triton kernels; on a CUDA device it holds the compiled kernels to it.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.contract import cast_inputs, check, evaluate, map_tensors
from bench.ops import adamw, ema, ewc, norm, packnet, specs
from bench.spec import OpSpec, Shape, shape_id
from mmkernels._device import INTERPRETED
from tests.kernels.recorded import opcheck

SPECS = specs()
MULTI_TENSOR = [spec for module in (adamw, ema, ewc, norm, packnet) for spec in module.SPECS]

# the interpreter takes milliseconds a tile; check draws more where the bound is missed by little
SEEDS = range(2) if INTERPRETED else range(8)
EXAMPLES = 3 if INTERPRETED else 20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
each_device = pytest.mark.parametrize("device", DEVICES)


pytestmark = pytest.mark.usefixtures("streamed")


def last_shape(spec: OpSpec) -> Shape:
    return spec.shapes[-1]


def every_other(x: torch.Tensor) -> torch.Tensor:
    between = torch.nan if x.is_floating_point() else 1 << 30
    return torch.stack([x, x.new_full(x.shape, between)], -1)[..., 0]


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT if x.ndim >= 2 else x


def broadcast(x: torch.Tensor) -> torch.Tensor:
    return x[..., :1].expand(x.shape) if x.ndim >= 2 else x


def bit_equal(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@each_device
@pytest.mark.parametrize(
    ("spec", "shape"),
    [pytest.param(spec, shape, id=f"{spec.name}-{shape_id(shape)}") for spec in SPECS for shape in spec.shapes],
)
def test_values_and_gradients_are_as_near_to_float64_as_the_reference_and_read_nothing_unwritten(
    spec: OpSpec, shape: Shape, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dtypes = spec.dtypes if INTERPRETED else (*spec.dtypes, torch.float64)
    # there a variant's data other than its plainest would take minutes
    cases = spec.cases[:1] if INTERPRETED and "[" in spec.name else spec.cases
    for case, dtype in itertools.product(cases, dtypes):
        # of two dtypes in memory that is filled with NaN where nothing was written
        torch.use_deterministic_algorithms(dtype in (torch.float32, torch.bfloat16))
        try:
            assert torch.empty(1).isnan().all() or not torch.are_deterministic_algorithms_enabled()
            check(spec, shape, case, dtype, device, SEEDS)
        finally:
            torch.use_deterministic_algorithms(False)


@each_spec
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_shapes_of_any_size_obey_the_bound(spec: OpSpec, data: st.DataObject) -> None:
    shape = spec.draw_shape(lambda low, high: data.draw(st.integers(low, high)))
    case, dtype = data.draw(st.sampled_from(spec.cases)), data.draw(st.sampled_from(spec.dtypes))
    first = data.draw(st.integers(0, 99))
    check(spec, shape, case, dtype, seeds=range(first, first + len(SEEDS)))


@each_device
@each_spec
@pytest.mark.parametrize("layout", [every_other, transposed, broadcast], ids=lambda layout: layout.__name__)
def test_any_strides_obey_the_bound(spec: OpSpec, layout: Callable[[torch.Tensor], torch.Tensor], device: str) -> None:
    if layout is broadcast and ("normalized" in spec.name or "gated" in spec.name):
        pytest.skip("columns made equal have no unit norm, and no gradient through one")
    check(spec, last_shape(spec), spec.cases[0], torch.float32, device, SEEDS, layout)


@each_device
@each_spec
def test_reruns_are_bit_identical(spec: OpSpec, device: str) -> None:
    inputs = cast_inputs(spec.make_inputs(last_shape(spec), spec.cases[0], torch.float32, 0), device=device)
    first, second = (evaluate(spec.op, inputs, spec.differentiable) for _ in range(2))
    assert bit_equal(first, second)


@each_device
@each_spec
def test_gradients_are_the_same_bits_whichever_are_asked_for(spec: OpSpec, device: str) -> None:
    inputs = cast_inputs(spec.make_inputs(last_shape(spec), spec.cases[0], torch.float32, 0), device=device)
    everything = evaluate(spec.op, inputs, spec.differentiable)
    for count in range(len(spec.differentiable)):
        for wrt in itertools.combinations(spec.differentiable, count):
            some = evaluate(spec.op, inputs, wrt)
            assert bit_equal(some, {name: everything[name] for name in some}), wrt


@each_device
@each_spec
def test_compiles_to_one_graph_with_the_same_bits(spec: OpSpec, device: str) -> None:
    torch._dynamo.reset()
    inputs = cast_inputs(spec.make_inputs(last_shape(spec), spec.cases[0], torch.float32, 0), device=device)
    compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager")
    expected = evaluate(spec.op, inputs, spec.differentiable)
    assert bit_equal(evaluate(compiled, inputs, spec.differentiable), expected)


# a list's ops take a table of addresses, which a copy does not have: see test_multi_tensor.py
@pytest.mark.parametrize("spec", [x for x in SPECS if x not in MULTI_TENSOR], ids=lambda spec: spec.name)
def test_its_registered_ops_pass_opcheck(spec: OpSpec) -> None:
    inputs = spec.make_inputs(spec.shapes[0], spec.cases[0], torch.float32, 0)
    for wrt in (spec.differentiable, spec.differentiable[1:2]):
        opcheck(lambda wrt=wrt: evaluate(spec.op, inputs, wrt))


@each_device
@each_spec
def test_autocast_casts_features_and_returns_gradients_in_their_own_dtype(spec: OpSpec, device: str) -> None:
    inputs = cast_inputs(spec.make_inputs(last_shape(spec), spec.cases[0], torch.float32, 0), device=device)
    lowered = map_tensors(
        lambda x: x.to(torch.bfloat16) if spec.casts_under_autocast and x.ndim and x.is_floating_point() else x, inputs
    )
    expected = evaluate(spec.op, lowered, spec.differentiable)
    with torch.autocast(device, torch.bfloat16):
        got = evaluate(spec.op, inputs, spec.differentiable)
    for name, value in got.items():
        assert value.dtype == (expected[name].dtype if name.startswith("out") else torch.float32)
        assert torch.equal(value.float(), expected[name].float()), name
