"""BYOL's heads and loss against the published formulas and lightly's, in float64; its teacher."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.nn import MomentumEncoder
from mmcore.systems.byol.model import BYOLModel
from mmcore.systems.byol.recipe import BYOL
from tests.systems.two_views import (
    NARROW,
    WIDE,
    WIDTH,
    agree,
    engine,
    lightly,
    moved,
    shared,
    small,
    step,
    torchs,
    views,
)


def written_out(predicted: Tensor, target: Tensor) -> Tensor:
    """The squared distance of unit vectors."""
    return (F.normalize(predicted, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()


@pytest.mark.parametrize("peer", ["formulas", "lightly"])
def test_outputs_loss_and_every_gradient_are_the_originals(peer: str) -> None:
    model: Any = small(BYOLModel, (WIDE, NARROW), (WIDE, NARROW))
    teacher, images = MomentumEncoder(model, 0.5), views()
    moved(model)
    projector, predictor = torchs(model.projector), torchs(model.predictor)
    if peer == "lightly":
        projector = shared(lightly("BYOLProjectionHead")(WIDTH, WIDE, NARROW), model.projector)
        predictor = shared(lightly("BYOLPredictionHead")(NARROW, WIDE, NARROW), model.predictor)
    read = [model.visual(images[:, i])[:, 1:].mean(1) for i in range(2)]
    predicted = [predictor(projector(x)) for x in read]
    targets = [teacher(images[:, [i]], only_projections=True)[0] for i in range(2)]
    if peer == "lightly":  # the mean of the two negative cosines
        negative = lightly("NegativeCosineSimilarity")()
        expected = 4 + 2 * (negative(predicted[0], targets[1]) + negative(predicted[1], targets[0]))
    else:
        expected = written_out(predicted[0], targets[1]) + written_out(predicted[1], targets[0])
    ours = BYOL().loss(model, images, step(teacher=teacher))["loss"]
    agree(model, ours, expected, but=("visual.class_embedding",))


def test_the_teachers_momentum_rises_to_one_and_its_statistics_are_of_its_batch() -> None:
    recipe, model = BYOL(teacher_momentum=0.5), small(BYOLModel, (WIDE, NARROW), (WIDE, NARROW)).float()
    teacher: Any = recipe.companions(engine(model))["teacher"]
    assert teacher.teacher.training and not any(p.requires_grad for p in teacher.parameters())
    found = []
    for number in (0, 4, 9):
        recipe.after_step(engine(model), step(teacher=teacher).__class__(number, 10, 0, {"teacher": teacher}))
        found.append(teacher.ema.decay)
    assert found == pytest.approx([0.5122, 0.75, 1.0], abs=1e-4)
    x = torch.cat(teacher(views().float(), only_projections=True))
    assert x.shape == (12, NARROW) and not x.requires_grad
