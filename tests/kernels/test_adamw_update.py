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
    assert found["params"][0].isnan().tolist() == gold["params"][0].isnan().tolist() == 3 * [True] + 3 * [False]
