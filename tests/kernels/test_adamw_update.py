"""What adamw_update_ promises beyond the contract that every op obeys."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import adamw_update_, adamw_update_ref_
from mmkernels._device import INTERPRETED

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
SIZES = [1, 4096, 300, 0, 4103]
SETTINGS: dict[str, Any] = {"lr": 0.01, "step": 3, "clamp": (-1.5, 1.5), "decay": 0.9}


def lists(sizes: list[int], **dtypes: torch.dtype) -> dict[str, list[Tensor]]:
    """Parameters, gradients and moments, and what else has a dtype; float32 unless it says otherwise."""
    generator = torch.Generator().manual_seed(0)
    names = {"params": FLOAT, "grads": FLOAT, "exp_avgs": FLOAT, "exp_avg_sqs": FLOAT} | dtypes
    found = {n: [torch.randn(s, generator=generator).to(d) for s in sizes] for n, d in names.items()}
    return found | {"exp_avg_sqs": [x.abs() for x in found["exp_avg_sqs"]]}


def stepped(fn: Any, found: dict[str, list[Tensor]], **settings: Any) -> dict[str, list[Tensor]]:
    found = {name: [x.clone() for x in tensors] for name, tensors in found.items()}
    first = [found.pop(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
    fn(*first, **found, **(SETTINGS | settings))
    return found | {"params": first[0], "exp_avgs": first[2], "exp_avg_sqs": first[3]}


@pytest.mark.parametrize(("param", "grad"), itertools.product((FLOAT, BFLOAT, HALF), repeat=2), ids=str)
def test_any_dtypes_are_stepped_in_float32(param: torch.dtype, grad: torch.dtype, walk: str) -> None:
    given = lists(SIZES, params=param, grads=grad, averages=FLOAT, copies=BFLOAT, shadows=HALF)
    found, gold = stepped(adamw_update_, given), stepped(adamw_update_ref_, given)
    for name, tensors in found.items():
        for x, expected in zip(tensors, gold[name], strict=True):
            # the interpreter cuts bfloat16 where a GPU rounds
            places = 2 if not INTERPRETED or x.dtype != BFLOAT else 4
            torch.testing.assert_close(x, expected, rtol=places * torch.finfo(x.dtype).eps, atol=1e-6)


def test_moments_may_be_in_half_precision_too(walk: str) -> None:
    given = lists(SIZES, exp_avgs=BFLOAT, exp_avg_sqs=HALF)
    found, gold = stepped(adamw_update_, given), stepped(adamw_update_ref_, given)
    for x, expected in zip(found["params"], gold["params"], strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_settings_as_tensors_are_those_numbers(walk: str) -> None:
    given = lists([500], averages=FLOAT)
    found = stepped(adamw_update_, given)
    as_tensors = {name: torch.tensor(SETTINGS[name], dtype=torch.float64) for name in ("lr", "step", "decay")}
    again = stepped(adamw_update_, given, **as_tensors)
    assert all(torch.equal(x, y) for name in found for x, y in zip(found[name], again[name], strict=True))


def test_the_first_steps_are_corrected_for_moments_of_zero(walk: str) -> None:
    """Each is a sign step of size lr, whatever the gradient's size."""
    for size in (1e-12, 1.0, 1e12):
        p, g, m, v = [torch.zeros(3)], [torch.full((3,), size)], [torch.zeros(3)], [torch.zeros(3)]
        adamw_update_(p, g, m, v, lr=0.1, step=1, eps=0.0, weight_decay=0.0)
        torch.testing.assert_close(p[0], torch.full((3,), -0.1))


def test_what_is_not_finite_is_not_hidden_by_the_clamp(walk: str) -> None:
    given = lists([6])
    given["grads"] = [torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0, 3.0])]
    found, gold = stepped(adamw_update_, given), stepped(adamw_update_ref_, given)
    assert (
        found["params"][0].isnan().tolist() == gold["params"][0].isnan().tolist() == 3 * [True] + 3 * [False]
    )


def test_dense_parameters_of_any_strides_are_stepped_in_place(walk: str) -> None:
    param = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    moments = [torch.zeros_like(param) for _ in range(2)]
    grad = torch.randn(3, 4, 5, 6)
    expected = [x.clone() for x in (param, *moments)]
    adamw_update_([param], [grad], *([x] for x in moments), lr=0.1, step=1)
    adamw_update_ref_([expected[0]], [grad], *([x] for x in expected[1:]), lr=0.1, step=1)
    torch.testing.assert_close(param, expected[0])


def test_gradients_that_lie_elsewhere_at_each_step_are_found(walk: str) -> None:
    p, m, v, gold = ([torch.zeros(5000)] for _ in range(4))
    moments = [torch.zeros(5000)], [torch.zeros(5000)]
    for step in range(1, 6):
        g = [torch.randn(5000)]
        adamw_update_(p, g, m, v, lr=0.1, step=step)
        adamw_update_ref_(gold, g, *moments, lr=0.1, step=step)
        del g
    torch.testing.assert_close(p[0], gold[0])


def test_it_compiles_into_a_graph_that_steps_in_place() -> None:
    def step(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> Tensor:
        adamw_update_(p, g, m, v, lr=0.1, step=2)
        return p[0] + 1

    torch._dynamo.reset()
    given = lists([5, 3])
    found, expected = ([[x.clone() for x in part] for part in given.values()] for _ in range(2))
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*found)
    assert torch.equal(result, step(*expected))
    assert all(
        torch.equal(x, y) for a, b in zip(found, expected, strict=True) for x, y in zip(a, b, strict=True)
    )


ONE = torch.ones(4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"grads": []}, "grads must be 1 tensors like params, got 0"),
    "shape": ({"exp_avgs": [torch.ones(5)]}, r"exp_avgs\[0\] must be \[4\], got \[5\]"),
    "dtype": ({"grads": [ONE.long()]}, r"grads\[0\] must be float32, .*, got torch.int64"),
    "an average that would stall": (
        {"averages": [ONE.bfloat16()]},
        r"averages\[0\] must be float32 or float64, got torch.bfloat16",
    ),
    "memory": (
        {"averages": [ONE], "params": [ONE]},
        r"(averages|params)\[0\] must share no memory with (averages|params)\[0\], got tensors that overlap",
    ),
    "layout": ({"params": [torch.ones(8)[::2]]}, r"params\[0\] must be dense in strides \[2\], got \[2\]"),
    "shadows of nothing": ({"shadows": [torch.ones(4)]}, "shadows must come with averages, got none"),
    "lr": ({"lr": -0.1}, "lr must be from 0 to inf, got -0.1"),
    "infinite lr": ({"lr": float("inf")}, "lr must be from 0 to inf, got inf"),
    "two lr": ({"lr": torch.ones(2)}, r"lr must be one number, got shape \[2\]"),
    "step": ({"step": 0}, "step must be from 1 to inf, got 0"),
    "decay": ({"averages": [torch.ones(4)], "decay": 1.1}, "decay must be from 0 to 1.0, got 1.1"),
    "betas": ({"betas": (1.0, 0.9)}, r"betas must be from 0 to less than 1, got \(1.0, 0.9\)"),
    "eps": ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    "weight decay": ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
    "clamp": ({"clamp": (2, 1)}, r"clamp must be \(low, high\), got \(2, 1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str) -> None:
    changed, message = REFUSED[case]
    arguments: dict[str, Any] = {
        name: [torch.ones(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
    }
    arguments |= {"lr": 0.1, "step": 1} | changed
    with pytest.raises(ValueError, match=f"^adamw_update_: {message}"):
        adamw_update_(**arguments)


@pytest.mark.gpu
def test_a_cuda_graph_reads_its_settings_anew() -> None:
    p, g, m, v = ([torch.zeros(5000, device="cuda")] for _ in range(4))
    g[0].fill_(1.0)
    lr, step = torch.tensor(0.5, device="cuda"), torch.tensor(1.0, device="cuda")
    adamw_update_(p, g, m, v, lr=lr, step=step, eps=0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_update_(p, g, m, v, lr=lr, step=step, eps=0.0)
    for x in (p, m, v):
        x[0].zero_()
    lr.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(p[0], torch.full((5000,), -0.25, device="cuda"))
