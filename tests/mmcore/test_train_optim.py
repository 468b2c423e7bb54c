"""The client optimizer and the schedule."""

import math

import pytest
import torch
from torch import nn

from mmcore.ema import warmed_up
from mmcore.train.optim import MAX_LOG_SCALE, OptimConfig, cosine_lr, make_optimizer, param_groups


def test_the_recipe_is_warmed_up_and_none_is_kept_without() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer([{"params": [p]}], OptimConfig(ema=0.5))
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-6)
    seen = []
    for _ in range(12):
        p.grad = torch.ones(3)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["ema"])
    assert seen == [warmed_up(0.5)(t) for t in range(12)] and seen[-1] == 0.5
    assert make_optimizer([{"params": [p]}], OptimConfig()).state_keys == ["exp_avg", "exp_avg_sq"]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.logit_scale = nn.Parameter(torch.tensor([4.6]))


def test_logit_scale_is_clamped_after_the_step_on_both_sides():
    for grad, bound in ((-1.0, MAX_LOG_SCALE), (1.0, 0.0)):
        model = Tower()
        optimizer = make_optimizer(param_groups(model, 0.2), OptimConfig(lr=10.0))
        model.logit_scale.grad = torch.tensor([grad])
        optimizer.step()
        assert model.logit_scale.item() == pytest.approx(bound, abs=1e-6)


def test_only_matrices_decay():
    groups = param_groups(Tower(), 0.2)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.2), (1, 0.0), (1, 0.0)]


def test_a_part_of_the_model_has_a_rate_of_its_own() -> None:
    groups = param_groups(nn.Sequential(Tower(), Tower()), 0.2, {"1.": 0.1})
    found = [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in groups]
    assert found == [(1, 0.2, 1.0), (2, 0.0, 1.0), (1, 0.2, 0.1), (2, 0.0, 0.1)]


def test_schedule_warms_up_linearly_and_ends_at_its_least() -> None:
    rates = [cosine_lr(s, OptimConfig(lr=2.0, warmup=10), 100) for s in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(math.isfinite(r) for r in rates)
    blip2 = OptimConfig(lr=1e-4, min_lr=1e-5, warmup_lr=1e-6, warmup=5)
    rates = [cosine_lr(s, blip2, 100) for s in range(101)]
    assert rates[0] == pytest.approx(1e-6 + 0.99e-4 / 5) and rates[4] == pytest.approx(1e-4)
    assert rates[100] == pytest.approx(1e-5) == min(rates[5:])


def test_a_tenth_of_the_run_is_the_longest_warm_up() -> None:
    assert cosine_lr(9, OptimConfig(lr=1.0, warmup=10_000), 100) == 1.0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lr": 0.0}, "--lr"),
        ({"lr": math.nan}, "--lr"),
        ({"ema": 1.0}, "--ema"),
        ({"min_lr": 1.0}, "--min-lr"),
        ({"warmup_lr": -1e-9}, "--warmup-lr"),
        ({"warmup": -1}, "--warmup"),
    ],
)
def test_bad_settings_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        OptimConfig(**wrong)
