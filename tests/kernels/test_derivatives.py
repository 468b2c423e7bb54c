"""What every op does where another derivative than backward()'s is asked for: the table of docs/ops.md, by cell."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops import specs
from bench.spec import OpSpec
from mmkernels import attention, attention_ref
from mmkernels._device import INTERPRETED
from tests.kernels.derivatives import MODES, Scalar, holds, table

DTYPE = torch.float32 if INTERPRETED else torch.float64
# torch's own sentences, of what it computes itself
BY_TORCH = r"derivative for aten::\S+ is not implemented|forward AD with \S+ that does not support it"


def weighted(result: Any) -> Tensor:
    results = [result] if isinstance(result, Tensor) else [x for x in result if x.numel()]
    return torch.stack([(x * x).sum() * (i + 1) for i, x in enumerate(results)]).sum()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_a_derivative_is_right_or_refused_as_the_table_says(spec: OpSpec, either_form: str) -> None:
    inputs = spec.make_inputs(spec.shapes[min(1, len(spec.shapes) - 1)], spec.cases[0], DTYPE, 0)
    tensors = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    cells = table()[f"`{spec.name.partition('[')[0]}`"]
    for name in spec.differentiable[:1] + spec.differentiable[2:3] or tensors[:1]:

        def scalar(fn: Callable[..., Any], name: str = name) -> Scalar:
            return lambda x: weighted(fn(**inputs | {name: x}))

        for mode in MODES:
            cell = cells[mode]
            if cell == "eager form":
                cell = "right" if either_form == "eager_form" else "refused"
            if cell != "no gradient":
                holds(cell, mode, scalar(spec.op), scalar(spec.ref), inputs[name])


@pytest.mark.skipif(INTERPRETED, reason="a CPU's plain attention is torch's")
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_plain_attention_on_a_cpu_has_the_derivatives_that_torchs_has(mode: str) -> None:
    q, k, v = (torch.randn(1, 9, 2, 8, dtype=DTYPE, generator=torch.Generator().manual_seed(i)) for i in range(3))
    op, ref = ((lambda x, fn=fn: weighted(fn(x, k, v))) for fn in (attention, attention_ref))
    holds(table()["`attention` of torch's"][mode], mode, op, ref, q, BY_TORCH)


def test_every_public_op_is_in_the_table() -> None:
    named = {spec.name.partition("[")[0] for spec in specs()}
    assert {f"`{name}`" for name in named} <= table().keys()
    assert all(
        cell in ("right", "refused", "eager form", "no gradient") for row in table().values() for cell in row.values()
    )
