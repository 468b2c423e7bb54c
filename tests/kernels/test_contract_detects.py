"""The contract turns red for planted bugs, on the path that this process and this machine run."""

import itertools
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench.contract import check
from mmkernels._device import INTERPRETED
from tests.kernels.planting import Bug, plant
from tests.kernels.plants import OPS, bugs

PATH = "kernel" if INTERPRETED or torch.cuda.is_available() else "blockwise"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUGS = bugs(PATH)
SEEDS = range(1 if INTERPRETED else 2)

pytestmark = pytest.mark.usefixtures("streamed", "aten_steps")


def hold(name: str, bug: Bug | None, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Holds an op to the contract with a bug or none, through the same machinery; in small chunks and tiles."""
    op, path = OPS[name], "late" if name == "late" else PATH
    module = import_module(f"{op.module.__package__}.{path}")
    monkeypatch.setattr(op.module, path, plant(module, bug, folder))
    for spec, shape in op.checks:
        for case, dtype in itertools.product(op.cases or spec.cases[:1], (torch.float32, torch.bfloat16)):
            check(spec, shape, case, dtype, DEVICE, SEEDS)


@pytest.mark.parametrize("op", OPS)
def test_the_contract_is_green_without_a_plant(op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hold(op, None, monkeypatch, tmp_path)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, found in BUGS.items() for name in found])
def test_the_contract_turns_red_for(op: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"bound|shape"):
        hold(op, BUGS[op][name], monkeypatch, tmp_path)
