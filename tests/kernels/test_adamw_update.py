"""What adamw_update_ promises beyond the contract that every op obeys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import adamw_update_, adamw_update_ref_
from tests.kernels.tensor_lists import tensors

SETTINGS: dict[str, Any] = {"lr": 0.01, "step": 3, "clamp": (-1.5, 1.5), "decay": 0.9}


def stepped(fn: Any, grad: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """New parameters and their averages."""
    param, exp_avg, exp_avg_sq, average = (tensors([len(grad)], torch.float32, seed) for seed in range(4))
    fn(param, [grad], exp_avg, [exp_avg_sq[0].abs_()], averages=average, **(SETTINGS | settings))
    return param[0], average[0]


def test_settings_as_tensors_are_those_numbers(path: str) -> None:
    as_tensors = {name: torch.tensor(SETTINGS[name], dtype=torch.float64) for name in ("lr", "step", "decay")}
    found, again = (stepped(adamw_update_, torch.linspace(-1, 1, 500), **more) for more in ({}, as_tensors))
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_first_steps_are_corrected_for_moments_of_zero(size: float, path: str) -> None:
    """A sign step of size lr, whatever the gradient's size."""
    p, g, m, v = [torch.zeros(3)], [torch.full((3,), size)], [torch.zeros(3)], [torch.zeros(3)]
    adamw_update_(p, g, m, v, lr=0.1, step=1, eps=0.0, weight_decay=0.0)
    torch.testing.assert_close(p[0], torch.full((3,), -0.1))


def test_what_is_not_finite_is_not_hidden_by_the_clamp(path: str) -> None:
    grad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0, 3.0])
    for fn in (adamw_update_, adamw_update_ref_):
        assert stepped(fn, grad)[0].isnan().tolist() == 3 * [True] + 3 * [False]
