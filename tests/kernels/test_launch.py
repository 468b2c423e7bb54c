"""How kernels are launched: on which device, in how large a grid, and what of their arguments is read."""

from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmkernels import _launch, attention, contrastive_loss
from mmkernels._device import INTERPRETED
from mmkernels.masks import causal
from tests.refusals import refuses

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, TRITON_INTERPRET=1")


class Recorded:
    """A kernel that notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **flags: self.launches.append((grid, arguments, flags))


def test_a_kernel_runs_on_the_device_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    @contextmanager
    def device(which: Any) -> Any:
        entered.append(which)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", device)
    kernel, x = Recorded(), SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    _launch.launch(kernel, (3, 2), x, 7, FLAG=True)  # pyright: ignore[reportArgumentType]
    assert entered == [torch.device("cuda:1"), None]
    assert kernel.launches == [((3, 2), (x, 7), {"FLAG": True})]


def test_a_grid_that_cuda_would_not_launch_is_refused() -> None:
    refuses(r"a grid must be at most .*, got \(1, 65536\)", _launch.launch, Recorded(), (1, 65_536), torch.zeros(1))


@interpreted
def test_attention_of_more_heads_than_an_axis_of_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, grids = import_module("mmkernels.attention.kernel"), []
    launch = _launch.launch

    def recorded(kernel: Any, grid: tuple[int, ...], *arguments: Any, **flags: Any) -> None:
        grids.append(grid)
        launch(kernel, grid, *arguments, **flags)

    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 40, 3, 16, requires_grad=True) for _ in range(3))
    seen, found = causal(40, 40), []
    monkeypatch.setattr(kernel, "launch", recorded)
    for most in (_launch.MOST_PROGRAMS, (2**31 - 1, 14, 14)):
        monkeypatch.setattr(kernel, "MOST_PROGRAMS", most)
        out = attention(q, k, v, mask=seen, dropout_p=0.2, seed=3)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    of_heads = [grid for grid in grids if len(grid) == 3]
    assert [grid[:2].index(15) for grid in of_heads] == [1] * 4 + [0] * 4
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@interpreted
def test_a_positive_beyond_32_bits_is_no_column() -> None:
    a, b = torch.randn(40, 16), torch.randn(50, 16)
    from mmkernels.contrastive.kernel import contrastive_fwd  # noqa: PLC0415 (imports triton)
    from mmkernels.contrastive.problem import Problem  # noqa: PLC0415

    for off in (2**32, -(2**32)):
        places = torch.arange(40)
        places[3] += off
        stats = contrastive_fwd(Problem(a, b, torch.tensor(1.0), places, None, None, True))
        assert stats.positive[3].isnan() and stats.positive.isnan().sum() == 1
    assert contrastive_loss(a, a, 1.0).isfinite()
