"""Deviation and used outputs of projections whose spread is known."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmcore.data import DataConfig, Preprocess, open_data
from mmcore.tasks import projection
from mmcore.tasks.subject import Subject

DATA = open_data(DataConfig(), seed=0)


def constant(images: Tensor) -> Tensor:
    return torch.ones(len(images), 8)


def spread(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(int(images.sum()) % 1000)
    return torch.randn(len(images), 8, generator=generator)


@pytest.mark.parametrize(("projects", "deviation", "used"), [(constant, 0.0, 1 / 8), (spread, 1.0, 1.0)])
def test_one_vector_deviates_by_nothing_and_noise_by_one(
    projects: Callable[[Tensor], Tensor], deviation: float, used: float
) -> None:
    recipe = SimpleNamespace(pictures=lambda data: data, projects=lambda *_: projects)
    assets = SimpleNamespace(preprocess=Preprocess(8))
    found = projection.follow(Subject(recipe, assets, None, DATA, torch.device("cpu")))
    assert abs(found[projection.DEVIATION] - deviation) < 0.05
    assert found[projection.USED] == used and found[projection.UNUSED] == 1 - used
