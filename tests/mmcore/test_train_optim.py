"""The client optimizer and the schedule."""

import math

import pytest
import torch
from torch import nn

from mmcore.train.optim import MAX_LOG_SCALE, AdamW, OptimConfig, clip_param_groups, cosine_lr


def test_steps_are_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    config = OptimConfig(lr=1e-2, ema=0.9)
    optimizer = AdamW([{"params": [ours], "weight_decay": 0.2}], config)
    reference = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True
    )
    for _ in range(5):
        ours.grad = torch.randn(7)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_ema_follows_its_formula_with_warm_up():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdamW([{"params": [p]}], OptimConfig(lr=0.1, ema=0.5, weight_decay=0.0))
    expected = p.detach().clone()
    for t in range(1, 12):
        p.grad = torch.ones(3, dtype=torch.float64) * t
        optimizer.step()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * p.detach()
        assert (optimizer.state[p]["ema"] - expected).abs().max() < 1e-7  # the rate is computed in float32


def test_without_ema_no_average_is_kept():
    p = nn.Parameter(torch.zeros(3))
    optimizer = AdamW([{"params": [p]}], OptimConfig())
    p.grad = torch.ones(3)
    optimizer.step()
    assert "ema" not in optimizer.state[p]
    assert optimizer.state_keys == ["exp_avg", "exp_avg_sq"]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.logit_scale = nn.Parameter(torch.tensor([4.6]))


def test_logit_scale_is_clamped_after_the_step_on_both_sides():
    for grad, bound in ((-1.0, MAX_LOG_SCALE), (1.0, 0.0)):
        model = Tower()
        optimizer = AdamW(clip_param_groups(model, 0.2), OptimConfig(lr=10.0))
        model.logit_scale.grad = torch.tensor([grad])
        optimizer.step()
        assert model.logit_scale.item() == pytest.approx(bound, abs=1e-6)


def test_only_matrices_decay():
    groups = clip_param_groups(Tower(), 0.2)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.2), (1, 0.0), (1, 0.0)]


def test_schedule_warms_up_linearly_and_ends_at_zero():
    rates = [cosine_lr(s, peak=2.0, warmup=10, total=100) for s in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(math.isfinite(r) for r in rates)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lr": 0.0}, "--lr"),
        ({"lr": math.nan}, "--lr"),
        ({"ema": 1.0}, "--ema"),
        ({"warmup": -1}, "--warmup"),
    ],
)
def test_bad_settings_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        OptimConfig(**wrong)
