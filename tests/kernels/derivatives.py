"""Derivatives other than those of backward(), and what the table of docs/ops.md says of them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

Scalar = Callable[[Tensor], Tensor]

REFUSED = "create_graph must be False|must not be differentiated by torch.func|must not be transformed by torch.func"


def of_gradient(f: Scalar, x: Tensor, along: Tensor) -> Tensor:
    """The gradient of f + |its gradient|^2."""
    x = x.clone().requires_grad_()
    value = f(x)
    [first] = torch.autograd.grad(value, x, create_graph=True)
    return torch.autograd.grad(value + first.square().sum(), x)[0]


def mapped(f: Scalar, x: Tensor, along: Tensor) -> Tensor:
    """Values over a batch, and the gradient of their sum."""
    x = x.clone().requires_grad_()
    values = torch.func.vmap(f)(torch.stack([x, -x]))
    return torch.cat([values.detach(), torch.autograd.grad(values.sum(), x)[0].flatten()])


def forward_mode(f: Scalar, x: Tensor, along: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, along))).tangent
        return torch.zeros(()) if tangent is None else tangent.clone()


# by the table's columns
MODES: dict[str, Callable[[Scalar, Tensor, Tensor], Tensor]] = {
    "`create_graph=True`": of_gradient,
    "`torch.func.grad`": lambda f, x, along: torch.func.grad(f)(x),
    "`torch.func.vmap`": mapped,
    "`torch.func.jvp`": lambda f, x, along: torch.func.jvp(f, (x,), (along,))[1],
    "forward-mode AD": forward_mode,
}


def table() -> dict[str, dict[str, str]]:
    """Cells by function and column."""
    page = (Path(__file__).parents[2] / "docs/ops.md").read_text()
    lines = re.findall(r"^\|(.*)\|$", page, re.MULTILINE)
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    return {name: dict(zip(head[1:], cells, strict=True)) for names, *cells in rows for name in names.split(", ")}


def holds(cell: str, mode: str, op: Scalar, ref: Scalar, x: Tensor, sentence: str = REFUSED) -> None:
    along = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    if cell != "right":
        assert cell == "refused"
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=sentence):
            MODES[mode](op, x, along)
        return
    expected = MODES[mode](ref, x, along)
    tolerance = 1e-3 if x.dtype == torch.float32 else 1e-8
    assert (MODES[mode](op, x, along) - expected).abs().max() <= tolerance * expected.abs().max()
