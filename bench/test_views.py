"""A training step of SimCLR and MoCo v3 beside its eager original: transformers' ViT and torch's layers at the same
weights and on the same views, losses as they are published, torch's fused AdamW, MoCo's loop over parameters."""

import copy
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTModel

from bench.case import Case, time_case
from bench.measure import machine_rates
from bench.test_clip_step import DEVICE, LR, UPDATE_BYTES, WEIGHT_DECAY
from mmcore.nn import BatchNorm, MomentumEncoder
from mmcore.optim import AdamWEMA
from mmcore.parts.vit import Tower
from mmcore.recipe import Step
from mmcore.systems.mocov3.recipe import MoCoV3
from mmcore.systems.simclr.recipe import SimCLR
from mmcore.systems.vit.two_views import TwoViewModel, TwoViews
from mmcore.systems.vit.weights import save_vit

RECIPES: dict[str, TwoViews] = {"simclr": SimCLR(model="ViT-S-16"), "mocov3": MoCoV3(model="ViT-S-16")}
SIZE, SIDE = (64, 224) if DEVICE.type == "cuda" else (4, 64)
MOMENTUM, CONTENDERS = 0.99, ("mmcore", "transformers, AdamW(fused)")


def made(system: str, size: int, side: int) -> tuple[TwoViews, Any, Tensor]:
    """Recipe, model and views; the heads are an eighth as wide on a CPU, whose batch is small beside them."""
    recipe, shrunk = RECIPES[system], 1 if DEVICE.type == "cuda" else 8
    shape = recipe.shape()
    widths = [tuple(max(64, x // shrunk) for x in head) for head in (shape.projector, shape.predictor)]
    vision = replace(shape.vision, image_size=side)
    torch.manual_seed(0)
    model = type(recipe).kind(replace(shape, vision=vision, projector=widths[0], predictor=widths[1]))
    images = torch.randn(size, 2, 3, side, side)
    return recipe, model.train().to(DEVICE), images.to(DEVICE)


def our_step(system: str, size: int, side: int) -> Callable[[], Tensor]:
    recipe, model, images = made(system, size, side)
    teacher = MomentumEncoder(model, MOMENTUM) if model.predictor is not None else None
    optimizer = AdamWEMA([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=WEIGHT_DECAY)
    step = Step(0, 1, 0, {} if teacher is None else {"teacher": teacher})

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = recipe.loss(model, images, step)["loss"]
        loss.backward()
        optimizer.step()
        if teacher is not None:
            teacher.update()
        return loss.detach()

    return run


class Eager(nn.Module):
    """transformers' ViT, read as ours is, and heads of torch's layers."""

    def __init__(self, ours: TwoViewModel) -> None:
        super().__init__()
        with TemporaryDirectory() as folder:
            save_vit(Tower(ours.config.vision, ours.visual.state_dict()), f"{folder}/vit")
            self.tower: Any = ViTModel.from_pretrained(f"{folder}/vit", add_pooling_layer=False)
        heads = [head for head in (ours.projector, ours.predictor) if head is not None]
        self.heads = nn.ModuleList(nn.Sequential(*map(_torchs, head)) for head in heads)
        self.pool = ours.pool

    def forward(self, images: Tensor) -> list[Tensor]:
        """What each head makes."""
        states = self.tower(images).last_hidden_state
        found = [states[:, 0] if self.pool == "class" else states[:, 1:].mean(1)]
        for head in self.heads:
            found.append(head(found[-1]))
        return found[1:]


def _torchs(layer: nn.Module) -> nn.Module:
    """torch's class of a layer, which holds its weights."""
    if isinstance(layer, BatchNorm):
        theirs: nn.Module = nn.BatchNorm1d(layer.num_features, affine=layer.affine)
    elif isinstance(layer, nn.Linear):
        theirs = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    else:
        return layer
    theirs.load_state_dict(layer.state_dict())
    return theirs


def _nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    rows = F.normalize(torch.cat([first, second]).float(), dim=1)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(first)))


def _contrast(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(query.float(), dim=1) @ F.normalize(key.float(), dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def their_step(system: str, size: int, side: int) -> Callable[[], Tensor]:
    recipe, ours, images = made(system, size, side)
    model, temperature = Eager(ours).to(DEVICE).train(), getattr(recipe, "temperature", 0.0)
    for p in model.tower.embeddings.patch_embeddings.parameters():
        p.requires_grad_(system == "simclr")
    model.tower.embeddings.position_embeddings.requires_grad_(system == "simclr")
    momentum = copy.deepcopy(model).requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def loss_of() -> Tensor:
        if system == "simclr":
            first, second = model(images.transpose(0, 1).flatten(0, 1))[0].chunk(2)
            return _nt_xent(first, second, temperature)
        queries = [model(images[:, i])[1] for i in range(2)]
        with torch.no_grad():
            keys = [momentum(images[:, i])[0] for i in range(2)]
        return _contrast(queries[0], keys[1], temperature) + _contrast(queries[1], keys[0], temperature)

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        if system == "mocov3":
            with torch.no_grad():
                for p, q in zip(momentum.parameters(), model.parameters(), strict=True):
                    p.data = p.data * MOMENTUM + q.data * (1 - MOMENTUM)
        return loss.detach()

    return run


STEPS = dict(zip(CONTENDERS, (our_step, their_step), strict=True))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("system", RECIPES)
def test_views_step(benchmark: Any, device: torch.device, system: str, contender: str) -> None:
    num_learned = sum(p.numel() for p in made(system, 1, SIDE)[1].parameters() if p.requires_grad)
    floor = UPDATE_BYTES * num_learned / machine_rates(device)[0]
    case = Case(f"{system} ViT-S-16-{SIDE}-B{SIZE}", contender, STEPS[contender](system, SIZE, SIDE), (), "step", floor)
    time_case(benchmark, device, case)


@pytest.mark.parametrize("system", RECIPES)
def test_both_compute_the_same_losses(system: str) -> None:
    """Of the same gradients, moments and averages too, three steps long."""
    ours, theirs = (steps(system, 8, 32) for steps in (our_step, their_step))
    for _ in range(3):
        assert ours().item() == pytest.approx(theirs().item(), rel=2e-2 if DEVICE.type == "cuda" else 1e-3)
