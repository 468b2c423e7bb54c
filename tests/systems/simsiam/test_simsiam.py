"""SimSiam's heads and loss against the published formulas and lightly's, in float64; its predictor's rate, its
collapse."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmcore.systems.simsiam.model import SimSiamModel
from mmcore.systems.simsiam.recipe import SimSiam
from mmcore.train.optim import param_groups
from tests.distributed.launch import run_ranks
from tests.systems.two_views import NARROW, NUM, WIDE, WIDTH, agree, lightly, shared, small, step, torchs, views


def model_of() -> Any:
    return small(SimSiamModel, (WIDE, WIDE, WIDE), (NARROW, WIDE))


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("peer", ["formulas", "lightly"])
def test_outputs_loss_and_every_gradient_are_the_originals(peer: str, stops: bool) -> None:
    model, images = model_of(), views()
    projector, predictor = torchs(model.projector), torchs(model.predictor)
    if peer == "lightly":
        projector = shared(lightly("SimSiamProjectionHead")(WIDTH, WIDE, WIDE), model.projector)
        predictor = shared(lightly("SimSiamPredictionHead")(WIDE, NARROW, WIDE), model.predictor)
    z = [projector(model.visual(images[:, i])[:, 1:].mean(1)) for i in range(2)]
    p = [predictor(x) for x in z]
    for x, y in zip(model(images), [*p, *z], strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)
    targets = [x.detach() if stops else x for x in z]
    if peer == "lightly":
        negative = lightly("NegativeCosineSimilarity")()
        expected = (negative(p[0], targets[1]) + negative(p[1], targets[0])) / 2
    else:
        expected = -(F.cosine_similarity(p[0], targets[1]) + F.cosine_similarity(p[1], targets[0])).sum() / (2 * NUM)
    agree(model, SimSiam(stop_gradient=stops).loss(model, images, step())["loss"], expected, but=("visual.class_emb",))


def test_the_predictors_rate_stays_and_all_others_fall() -> None:
    model, recipe = model_of(), SimSiam()
    groups = param_groups(model, recipe.optim, recipe.rules)
    fixed = {p for group in groups if group["fixed_lr"] for p in group["params"]}
    assert fixed == set(model.predictor.parameters())


def test_a_run_that_collapses_stops_with_the_number_and_what_to_look_at(tmp_path: Path) -> None:
    flags = "--data scattered --views source --batch-size 16 --steps 180 --eval-every 60 --optimizer adamw"
    flags += " --lr 1e-2 --warmup 10 --no-stop-gradient"
    [result] = run_ranks("worker_collapse", 1, tmp_path, package="tests.systems.simsiam", flags=flags)
    assert result["said"].startswith("step 60: the deviation of projections (held-out) is 0.0"), result
    assert ", below 0.05: " in result["said"] and "Look at --lr (now 0.01), --warmup, --batch-size" in result["said"]
    assert "a stop-gradient" in result["said"]
    assert "eval/deviation of projections" in (tmp_path / "run/metrics.jsonl").read_text()
    assert not (tmp_path / "run/checkpoints").exists()
