"""What the tests of recipes of two views share: models in float64 moved by noise, and lightly's classes."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcore.nn import BatchNorm
from mmcore.recipe import Step
from mmcore.systems.vit.shapes import vit_vision
from mmcore.systems.vit.two_views import TwoViewConfig, TwoViewModel
from tests.torchvision_stub import torchvision_or_skip

NUM, WIDTH, WIDE, NARROW = 6, 16, 20, 12


def moved(model: Any) -> Any:
    """In float64, every parameter moved by seeded noise."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().train()


def small(
    kind: type[TwoViewModel],
    projector: tuple[int, ...],
    predictor: tuple[int, ...] = (),
    config: Any = TwoViewConfig,
    **options: Any,
) -> Any:
    """A model with a tower of two layers, patches of 4 of 8 pixels."""
    torch.manual_seed(0)
    return moved(kind(config(vit_vision(8, 4, WIDTH, 2, 4, 32, **options), projector, predictor)))


def views() -> Tensor:
    """[6, 2, 3, 8, 8]."""
    return torch.randn(NUM, 2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def step(**companions: nn.Module) -> Step:
    return Step(0, 10, 0, companions)


def engine(model: nn.Module) -> Any:
    """What a recipe asks of an engine."""
    return SimpleNamespace(deepspeed=model, module=model, device=torch.device("cpu"))


def lightly(name: str) -> Any:
    """A class of lightly's, or a skip."""
    torchvision_or_skip()
    if find_spec("lightly") is None:
        pytest.skip("lightly is not installed (pip install --no-deps lightly==1.6.0)")
    is_loss = name.endswith(("Loss", "Similarity"))
    return getattr(import_module("lightly.loss" if is_loss else "lightly.models.modules.heads"), name)


def torchs(head: nn.Sequential) -> nn.Sequential:
    """The same head of torch's own layers, which hold the weights of ours."""
    layers: list[nn.Module] = []
    for layer in head:
        if isinstance(layer, BatchNorm):
            layers.append(nn.BatchNorm1d(layer.num_features, affine=layer.affine))
        elif isinstance(layer, nn.Linear):
            layers.append(nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
        else:
            layers.append(nn.ReLU())
    return shared(nn.Sequential(*layers).double(), head)


def shared(theirs: Any, ours: nn.Module) -> Any:
    """`theirs` with the parameters of ours, by their order."""
    own = list(ours.parameters())
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in own]
    for name, p in zip([name for name, _ in theirs.named_parameters()], own, strict=True):
        path, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(path), last, p)
    return theirs.double().train()


def agree(model: nn.Module, ours: Tensor, theirs: Tensor, *, but: tuple[str, ...] = ()) -> None:
    """The losses, and every gradient that there is; none is missing `but` of names that begin so."""
    assert abs(ours - theirs) < 1e-9
    named: Mapping[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if not n.startswith(but or "-")}
    found, expected = (torch.autograd.grad(x, list(named.values())) for x in (ours, theirs))
    for name, x, y in zip(named, found, expected, strict=True):
        assert (x - y).abs().max() < 1e-9, name
