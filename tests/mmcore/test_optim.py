"""Optimizers with their average: torch's steps, the average's recurrence, half precision, state, swapping."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcore.ema import EMA, warmed_up
from mmcore.optim import LARSEMA, SGDEMA, AdamWEMA, EMAOptimizer, MuonEMA
from tests.refusals import refuses

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 30), nn.GELU(), nn.Linear(30, 3)).to(dtype)


def by_kind(model: nn.Module) -> list[dict[str, Any]]:
    """Groups as Muon wants them."""
    params = list(model.parameters())
    kinds = [[p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]]
    return [{"params": kinds[0]}, {"params": kinds[1], "muon": False}]


MAKE: dict[str, Callable[..., EMAOptimizer]] = {"adamw": AdamWEMA, "sgd": SGDEMA, "lars": LARSEMA, "muon": MuonEMA}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int, first: int = 0) -> None:
    for step in range(first, first + num):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


def assert_close_models(ours: nn.Module, theirs: nn.Module) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p, q)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def test_adamw_is_its_recurrence_in_float64_and_its_average_that_of_ema() -> None:
    ours, expected = model_of(), [p.detach().double() for p in model_of().parameters()]
    optimizer, ema = AdamWEMA(ours.parameters(), **SETTINGS, ema=warmed_up(0.9)), EMA(ours, warmed_up(0.9))
    means, squares = [torch.zeros_like(x) for x in expected], [torch.zeros_like(x) for x in expected]
    for t in range(1, 21):
        steps(ours, optimizer, 1, t)
        ema.update()
        for i, p in enumerate(ours.parameters()):
            assert p.grad is not None
            dx = p.grad.double()
            means[i], squares[i] = 0.9 * means[i] + 0.1 * dx, 0.98 * squares[i] + 0.02 * dx**2
            update = means[i] / (1 - 0.9**t) / ((squares[i] / (1 - 0.98**t)).sqrt() + 1e-6)
            expected[i] = expected[i] - 1e-2 * (0.2 * expected[i] + update)
    for (name, p), x in zip(ours.named_parameters(), expected, strict=True):
        close(p.detach(), x.float())
        close(optimizer.state[p]["ema"], ema.averages[name])
        assert optimizer.state[p]["step"] == 20


def test_groups_a_scheduler_and_parameters_without_a_gradient_are_as_with_torchs_adamw() -> None:
    models = model_of(), model_of()
    optimizers = [
        make([{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 0.1, "weight_decay": 0.0}])
        for m, make in zip(models, (AdamWEMA, torch.optim.AdamW), strict=True)
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    for step in range(6):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            torch.manual_seed(step)
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn_like(p) if i != 1 or step % 2 else None
            optimizer.step()
            scheduler.step()
    assert_close_models(*models)
    assert [int(s["step"]) for s in optimizers[0].state.values()] == [6, 6, 6, 3]


class TestHalfPrecision:
    def test_weights_are_copies_of_a_float32_master_that_small_steps_move(self) -> None:
        """At a rate of 1e-5 a step is below half of bfloat16's last place: torch's AdamW stands still."""
        ours, plain, exact = (
            nn.Parameter(torch.ones(64, dtype=d)) for d in (torch.bfloat16, torch.bfloat16, torch.float32)
        )
        optimizer = AdamWEMA([ours], lr=1e-5, weight_decay=0.0, ema=0.99)
        others = [torch.optim.AdamW([p], lr=1e-5, weight_decay=0.0) for p in (plain, exact)]
        for _ in range(1000):
            for p in (ours, plain, exact):
                p.grad = torch.ones_like(p)
            for each in (optimizer, *others):
                each.step()
        state = optimizer.state[ours]
        assert torch.equal(plain, torch.ones_like(plain))
        torch.testing.assert_close(state["master"], exact.detach(), rtol=1e-5, atol=0)
        assert torch.equal(ours, state["master"].bfloat16())
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "ema")} == {torch.float32}

    @pytest.mark.parametrize("make", MAKE)
    def test_masters_step_and_are_averaged_as_float32_weights_and_clamped(self, make: str) -> None:
        half, wide = model_of(torch.bfloat16), model_of(torch.bfloat16).float()
        settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "clamp": (-0.1, 0.1)}
        optimizers = [MAKE[make](by_kind(m), **settings, ema=warmed_up(0.9)) for m in (half, wide)]
        ema = EMA(wide, warmed_up(0.9))
        for step in range(4):
            steps(half, optimizers[0], 1, step)
            for p, q in zip(half.parameters(), wide.parameters(), strict=True):
                assert p.grad is not None
                q.grad = p.grad.float()
            optimizers[1].step()
            ema.update()
        for p, (name, q) in zip(half.parameters(), wide.named_parameters(), strict=True):
            close(optimizers[0].state[p]["master"], q.detach())
            assert torch.equal(p, optimizers[0].state[p]["master"].bfloat16()) and q.abs().max() <= 0.1
            close(optimizers[0].state[p]["ema"], ema.averages[name])

    @pytest.mark.parametrize("make", MAKE)
    def test_a_state_that_is_saved_and_loaded_stays_in_float32_and_goes_on_to_the_bit(self, make: str) -> None:
        whole, first, again = (model_of(torch.bfloat16) for _ in range(3))
        optimizers = [MAKE[make](by_kind(m), lr=1e-2, ema=warmed_up(0.9)) for m in (whole, first, again)]
        steps(whole, optimizers[0], 5)
        steps(first, optimizers[1], 3)
        again.load_state_dict(first.state_dict())
        optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        steps(again, optimizers[2], 2, first=3)
        for p, q in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q)
            for key, value in optimizers[0].state[p].items():
                assert torch.equal(value, optimizers[2].state[q][key]) and value.dtype == torch.float32


def test_it_takes_over_from_torchs_adamw() -> None:
    ours, theirs = model_of(), model_of()
    reference = torch.optim.AdamW(theirs.parameters(), **SETTINGS)
    steps(theirs, reference, 4)
    ours.load_state_dict(theirs.state_dict())
    optimizer = AdamWEMA(ours.parameters(), **SETTINGS, ema=0.5)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    start = [p.detach().clone() for p in ours.parameters()]
    steps(ours, optimizer, 1, 4)
    steps(theirs, reference, 1, 4)
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        close(p, q)
        close(optimizer.state[p]["ema"], (before + p) / 2)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_sgd_steps_as_torchs(decay: float) -> None:
    models = model_of(), model_of()
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": decay}
    for model, make in zip(models, (SGDEMA, torch.optim.SGD), strict=True):
        steps(model, make(model.parameters(), **settings), 6)
    assert_close_models(*models)


def test_lars_scales_matrices_by_their_norms_and_neither_scales_nor_decays_vectors() -> None:
    """The formula of SimCLR and MoCo v3, in float64; a matrix of zeros has no norm and is not scaled."""
    torch.manual_seed(0)
    shapes = [(3, 4), (4,), (2, 3, 2, 2), (3, 3)]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    params[3].data.zero_()
    optimizer = LARSEMA(params, lr=2.0, momentum=0.9, weight_decay=0.1)
    expected = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, dtype=torch.float64)
            direction = p.grad
            if p.ndim > 1:
                direction = p.grad + 0.1 * expected[i]
                norms = expected[i].norm(), direction.norm()
                direction = direction * (0.001 * norms[0] / norms[1] if norms[0] > 0 else 1.0)
            buffers[i] = 0.9 * buffers[i] + direction
            expected[i] = expected[i] - 2.0 * buffers[i]
        optimizer.step()
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)


def test_muon_steps_matrices_as_torchs_and_the_others_as_adamw() -> None:
    models = [model_of() for _ in range(3)]
    matrices, others = ([group["params"] for group in by_kind(m)] for m in models[1:])
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.2}
    muon = torch.optim.Muon(matrices[0], momentum=0.9, **settings, adjust_lr_fn="match_rms_adamw")
    steps(models[0], MuonEMA(by_kind(models[0]), momentum=0.9, **settings), 6)
    steps(models[1], muon, 6)
    steps(models[2], torch.optim.AdamW(others[1], **settings), 6)
    for p, q, r in zip(*(m.parameters() for m in models), strict=True):
        # an ulp of a weight's rounding may round otherwise in bfloat16, of which an update of 2e-3 has 8 bits
        torch.testing.assert_close(p, q if p.ndim == 2 else r, rtol=2e-6, atol=1e-6)


def test_each_gradient_is_clipped_to_a_norm_of_its_own() -> None:
    params = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = SGDEMA(params, lr=1.0, momentum=0.0, clip_each=3.0)
    params[0].grad, params[1].grad = torch.full((4,), 3.0), torch.full((4,), 1.0)
    optimizer.step()
    close(params[0].detach(), torch.full((4,), -1.5))
    assert torch.equal(params[1], torch.full((4,), -1.0))


@pytest.mark.parametrize("make", MAKE)
def test_a_frozen_group_stays_as_it_is_without_a_state(make: str) -> None:
    model = model_of()
    optimizer = MAKE[make](by_kind(model), lr=0.1)
    optimizer.param_groups[1]["frozen"] = True
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, 2)
    same = {name: torch.equal(x, before[name]) for name, x in model.state_dict().items()}
    assert same == {"0.weight": False, "0.bias": True, "2.weight": False, "2.bias": True}
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_shows_the_averages_in_place_and_brings_all_back_to_the_bit(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    optimizer = AdamWEMA(model.parameters(), **SETTINGS, ema=0.5)
    steps(model, optimizer, 3)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    averages = [optimizer.state[p]["ema"].to(dtype, copy=True) for p in model.parameters()]
    with pytest.raises(KeyError), optimizer.swapped():
        assert all(torch.equal(p, x) for p, x in zip(model.parameters(), averages, strict=True))
        raise KeyError
    after = model.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, (before[0], before[1]["state"]), rtol=0, atol=0)


def test_a_closure_is_called_with_gradients_its_loss_returned_and_no_average_kept_unasked() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([p], ema=None)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and (p < 1).all()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


def test_bad_settings_are_refused_by_name_before_a_weight_moves() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    less_than_1, decay, clamp = "from 0 to less than 1", ("weight_decay", -0.1, "at least 0"), (1.0, 0.0)
    for name, value, contract in (
        ("clip_each", 0.0, "above 0 or None"), ("lr", -1.0, "at least 0"), ("betas", (0.9, 1.0), less_than_1), decay,
        ("ema", 1.5, "from 0 to 1, a schedule or None"), ("eps", -1e-8, "at least 0"),
        ("clamp", clamp, r"\(low, high\)"),
    ):  # fmt: skip
        message = rf"^(AdamWEMA|adamw_update_): {name} must be {contract}, got {re.escape(str(value))}"
        refuses(message, lambda options: AdamWEMA([p], **options).step(), {name: value})
    assert torch.equal(p, torch.ones(3))
    for make in (SGDEMA, LARSEMA, MuonEMA):
        for name, value, contract in (("momentum", 1.0, less_than_1), decay, ("clamp", clamp, r"\(low, high\)")):
            message = f"^{make.__name__}: {name} must be {contract}, got {re.escape(str(value))}"
            refuses(message, make, [nn.Parameter(torch.ones(3, 3))], **{name: value})


def test_muon_refuses_what_is_no_matrix_and_all_a_sparse_gradient() -> None:
    refuses(r"MuonEMA: parameters must be matrices, .* got shape \[3\]", MuonEMA, [nn.Parameter(torch.ones(3))])
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    refuses("AdamWEMA: gradients must be dense, got a sparse one", AdamWEMA(table.parameters()).step)
