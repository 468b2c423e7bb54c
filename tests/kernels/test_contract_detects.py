"""The contract turns red for planted bugs, on the path that this process and this machine run."""

import itertools
from pathlib import Path

import pytest
import torch

from mmkernels._contract import check
from mmkernels._device import INTERPRETED
from tests.kernels.plants import ALL
from tests.kernels.plants.plant import Plants, plant

PATH = "kernel" if INTERPRETED or torch.cuda.is_available() else "blockwise"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("streamed", "aten_steps")


def contract(plants: Plants) -> None:
    for spec, shape in plants.checks:
        for case, dtype in itertools.product(plants.cases or spec.cases[:1], (torch.float32, torch.bfloat16)):
            check(spec, shape, case, dtype, DEVICE, seeds=range(2))


@pytest.mark.parametrize("op", ALL)
def test_the_contract_is_green_without_a_plant(
    op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the same machinery, so that red below is the plant's doing; in small chunks and tiles."""
    plants = ALL[op]
    monkeypatch.setattr(plants.op, PATH, plant(plants.paths[PATH], "import ", "import ", tmp_path))
    contract(plants)


@pytest.mark.parametrize(
    ("op", "bug"), [(op, bug) for op, plants in ALL.items() for bug in plants.bugs[PATH]]
)
def test_the_contract_turns_red_for(
    op: str, bug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plants = ALL[op]
    old, new = plants.bugs[PATH][bug]
    monkeypatch.setattr(plants.op, PATH, plant(plants.paths[PATH], old, new, tmp_path))
    with pytest.raises(AssertionError, match=r"bound|shape"):
        contract(plants)
