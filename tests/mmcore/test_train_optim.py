"""The client optimizer, its groups and the schedules."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mmcore.ema import warmed_up
from mmcore.optim import LARSEMA, SGDEMA, AdamWEMA, MuonEMA
from mmcore.systems.clip.recipe import Clip
from mmcore.train import schedules
from mmcore.train.optim import (
    OptimConfig,
    Rule,
    depths,
    lr_schedule,
    make_optimizer,
    param_groups,
    weight_decay_schedule,
)
from tests.refusals import refuses


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
    for grad, bound in ((-1.0, math.log(100.0)), (1.0, 0.0)):
        model = Tower()
        optimizer = make_optimizer(param_groups(model, OptimConfig(), Clip().rules), OptimConfig(lr=10.0))
        model.logit_scale.grad = torch.tensor([grad])
        optimizer.step()
        assert model.logit_scale.item() == pytest.approx(bound, abs=1e-6)


def test_the_first_rule_that_fits_a_name_says_how_a_group_is_trained() -> None:
    rules = [
        Rule("0.linear.weight", weight_decay=0.0, fixed_lr=True),
        Rule("0.linear", frozen_until=7, weight_decay=0.5),
        Rule("1", clamp=(0.0, 1.0)),
    ]
    model = nn.Sequential(Tower(), Tower())
    groups = param_groups(model, OptimConfig(weight_decay_end=0.4), rules)
    keys = ("weight_decay", "fixed_lr", "frozen_until", "clamp", "scheduled_decay")
    of = {p: tuple(group[key] for key in keys) for group in groups for p in group["params"]}
    plain, clamped = (0.0, False, 0, None, False), (0.0, False, 0, (0.0, 1.0), False)
    assert {name: of[p] for name, p in model.named_parameters()} == {
        "0.linear.weight": (0.0, True, 0, None, False),
        "0.linear.bias": (0.0, False, 7, None, False),
        "0.logit_scale": plain,
        "1.linear.weight": (0.2, False, 0, (0.0, 1.0), True),
        "1.linear.bias": clamped,
        "1.logit_scale": clamped,
    }


def test_each_optimizer_is_made_with_its_settings_and_muon_leaves_embeddings_to_adamw() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    made: dict[Any, tuple[type, dict[str, Any]]] = {
        "adamw": (AdamWEMA, {"betas": (0.9, 0.98)}), "sgd": (SGDEMA, {"momentum": 0.9}),
        "lars": (LARSEMA, {"momentum": 0.9}), "muon": (MuonEMA, {"momentum": 0.95, "betas": (0.9, 0.98)}),
    }  # fmt: skip
    for name, (kind, settings) in made.items():
        config: Any = OptimConfig(optimizer=name, clip_each=3.0)
        optimizer = make_optimizer(param_groups(model, config), config)
        assert type(optimizer) is kind and optimizer.defaults.items() >= settings.items()
        assert {group["clip_each"] for group in optimizer.param_groups} == {3.0}
    sgd = make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], OptimConfig(optimizer="sgd", momentum=0.5))
    assert sgd.defaults["momentum"] == 0.5
    muon = param_groups(model, OptimConfig(optimizer="muon"))
    kinds = [(list(group["params"][0].shape), group["muon"]) for group in muon]
    assert kinds == [([3, 2], False), ([2, 2], True), ([2], False)]


NAMES = {
    "logit_scale": 1.0, "visual.class_embedding": 0.0625, "visual.transformer.blocks.0.norm.weight": 0.125,
    "visual.transformer.blocks.1.layers.0.weight": 0.25, "visual.transformer.blocks.2.norm.weight": 0.5,
    "visual.norm_post.weight": 1.0, "text.token_embedding.weight": 0.25, "text.layers.0.norm.weight": 0.5,
    "text.proj.weight": 1.0,
}  # fmt: skip


def test_layer_decay_counts_from_the_top_of_each_stack_of_blocks() -> None:
    depth = depths(list(NAMES))
    assert {name: 0.5 ** (4 - depth(name)) for name in NAMES} == NAMES
    alone = ["class_embedding", "blocks.0.weight", "head.weight"]
    assert list(map(depths(alone), alone)) == [0, 1, 2]
    refuses("--layer-decay must be of a model with numbered blocks or layers", depths, ["weight"])


def test_layer_decay_scales_the_rates_of_groups_by_names_or_by_depths_that_are_given() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2) for _ in range(2)]), "head": nn.Linear(2, 2)})
    config = OptimConfig(layer_decay=0.5)
    rates = [group["lr_scale"] for group in param_groups(model, config, [Rule("head", 3.0)])]
    assert rates == [3.0, 3.0, 0.5, 0.5, 0.25, 0.25]
    given = param_groups(model, config, layers=lambda name: 2 if "head" in name else 0)
    assert [group["lr_scale"] for group in given] == [1.0, 1.0, 0.25, 0.25]


def test_schedules_have_their_values_at_the_first_the_middle_and_the_last_step() -> None:
    made = {
        "constant": (schedules.constant(2.0), [2.0, 2.0, 2.0, 2.0]),
        "linear": (schedules.linear(2.0, 1.0, 10), [2.0, 1.5, 1.0, 1.0]),
        "cosine": (schedules.cosine(2.0, 1.0, 10), [2.0, 1.5, 1.0, 1.0]),
        "multistep": (schedules.multistep(2.0, [5, 10], 0.5), [2.0, 1.0, 0.5, 0.5]),
        "const_cooldown": (schedules.const_cooldown(2.0, 1.0, 10, 6), [2.0, 2.0 - 1 / 6, 1.0, 1.0]),
        "warmed": (schedules.warmed(schedules.linear(2.0, 1.0, 4), 1.0, 6), [7 / 6, 2.0, 1.0, 1.0]),
    }
    for name, (schedule, values) in made.items():
        assert [schedule(step) for step in (0, 5, 10, 12)] == pytest.approx(values), name
    assert schedules.multistep(2.0, [5], 0.5)(4) == schedules.const_cooldown(2.0, 1.0, 10, 6)(4) == 2.0
    assert schedules.cosine(2.0, 1.0, 12)(4) == pytest.approx(1.75)


@pytest.mark.parametrize(("settings", "middle", "last"), [
    ({"schedule": "cosine", "min_lr": 0.1}, 0.55, 0.1), ({"schedule": "linear", "min_lr": 0.1}, 0.55, 0.1),
    ({"schedule": "constant"}, 1.0, 1.0),
    ({"schedule": "multistep", "milestones": (0.5, 0.75, 0.9), "gamma": 0.5}, 0.5, 0.125),
    ({"schedule": "const-cooldown", "cooldown_share": 0.25, "min_lr": 0.1}, 1.0, 0.1),
])  # fmt: skip
def test_a_run_warms_up_and_goes_on_as_its_schedule_says(settings: dict[str, Any], middle: float, last: float) -> None:
    rate = lr_schedule(OptimConfig(lr=1.0, warmup=20, **settings), 220)
    assert [rate(step) for step in (0, 19, 20)] == pytest.approx([0.05, 1.0, 1.0])
    assert [rate(step) for step in (120, 220)] == pytest.approx([middle, last])
    if settings["schedule"] == "const-cooldown":
        assert rate(165) == 1.0 and rate(166) < 1.0


def test_weight_decay_goes_along_a_cosine_to_its_end() -> None:
    decay = weight_decay_schedule(OptimConfig(weight_decay=0.04, weight_decay_end=0.4), 100)
    assert [decay(step) for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert weight_decay_schedule(OptimConfig(weight_decay=0.04), 100)(50) == 0.04


def test_bad_settings_are_refused_by_name():
    for name, value in (
        ("lr", 0.0), ("lr", math.nan), ("ema", 1.0), ("min_lr", 1.0), ("warmup_lr", -1e-9), ("warmup", -1),
        ("weight_decay_end", -0.1), ("clip_each", 0.0), ("layer_decay", 1.5),
    ):  # fmt: skip
        refuses(f"--{name.replace('_', '-')} must", OptimConfig, **{name: value})
    refuses("--momentum must", OptimConfig, optimizer="sgd", momentum=1.0)
    refuses("--milestones must be shares", OptimConfig, schedule="multistep", milestones=(30.0,))
    message = "--momentum has no effect with --optimizer adamw: it must stay None, got 0.9"
    refuses(message, OptimConfig, momentum=0.9)
    refuses("--beta2 has no effect with --optimizer lars", OptimConfig, optimizer="lars", beta2=0.999)
    refuses("--min-lr has no effect with --schedule constant", OptimConfig, schedule="constant", min_lr=1e-5)
    for name, value in (("milestones", (0.5,)), ("gamma", 0.5), ("cooldown_share", 0.5)):
        message = f"--{name.replace('_', '-')} has no effect with --schedule cosine"
        refuses(message, OptimConfig, **{name: value})
