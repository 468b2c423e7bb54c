"""What linear cross-entropy promises beyond the contract that every op obeys."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contract import check, evaluate
from bench.ops.linear_cross_entropy import IGNORED, PLAIN, ROWS
from bench.spec import OpSpec
from mmkernels import linear_cross_entropy, linear_cross_entropy_ref
from mmkernels._device import INTERPRETED
from mmkernels.linear_cross_entropy import op
from tests.kernels.recorded import Operations

WRT = ("hidden", "weight")
EVERY_OPTION: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1}


@pytest.fixture
def captured(streamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured: ignored rows are computed too."""
    monkeypatch.setattr(op, "_rows", lambda kept, hidden: (None, None))


@pytest.fixture
def counted(streamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: rows that count come first, and how many they are is asked for behind a first product."""
    monkeypatch.setattr(op, "_counts_ahead", lambda hidden: hidden.dtype != torch.float64)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, TRITON_INTERPRET=1")


def problem(num_rows: int = 40, width: int = 24, vocab: int = 70, dtype: torch.dtype = torch.float32):
    """Leaves hidden and weight, and targets of which every third is ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (num_rows,))
    targets[::3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("spec", [IGNORED, ROWS], ids=lambda spec: spec.name)
def test_rows_weighted_by_zero_obey_the_contract_as_rows_left_out_do(spec: OpSpec, captured: None) -> None:
    for case, dtype in itertools.product(spec.cases, spec.dtypes):
        check(spec, spec.shapes[-1], case, dtype, seeds=range(4))


@interpreted
@pytest.mark.parametrize("spec", [PLAIN, IGNORED, ROWS], ids=lambda spec: spec.name)
def test_rows_counted_behind_a_first_product_obey_it_too(spec: OpSpec, counted: None) -> None:
    for case, dtype in itertools.product(spec.cases, spec.dtypes):
        check(spec, spec.shapes[-1], case, dtype, seeds=range(2))


@interpreted
@pytest.mark.parametrize("num_kept", [0, 5, 16, 17, 40])
def test_of_rows_that_are_counted_only_those_that_count_are_computed(num_kept: int, counted: None) -> None:
    """But for the 16 of the first product."""
    hidden, weight, targets = problem()
    targets[:] = -100
    targets[torch.randperm(40)[:num_kept]] = 3
    rows = linear_cross_entropy_ref(hidden, weight, targets, reduction="none")
    expected = [rows.detach(), *torch.autograd.grad(rows.sum(), (hidden, weight))]
    leaves = hidden.detach(), weight.detach()
    with Operations() as seen:
        *found, _ = op._run(*leaves, None, targets, torch.ones(40), -100, (0.0, 0.0), (True, True, False))
    assert seen.multiplications == (2 * num_kept + max(16, num_kept)) * weight.numel()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_without_z_loss_it_is_torchs_cross_entropy(
    reduction: str, label_smoothing: float, has_bias: bool, either_form: None
) -> None:
    hidden, weight, targets = (x.detach() for x in problem())
    bias = torch.randn(len(weight)) if has_bias else None
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, **options)
    for loss in (linear_cross_entropy, linear_cross_entropy_ref):
        torch.testing.assert_close(loss(hidden, weight, targets, bias=bias, **options), expected)


def test_it_is_the_cross_entropy_of_the_smoothed_labels_plus_z_times_log_z_squared(either_form: None) -> None:
    """The papers' formulas, term by term: q' = (1 - eps) q + eps / V (1512.00567), z log^2 Z (2204.02311)."""
    hidden, weight, targets = problem()
    hidden, weight = hidden.detach().double(), weight.detach().double()
    total, count = 0.0, 0
    for row, target in zip(hidden, targets.tolist()):
        if target == -100:
            continue
        exps = [math.exp(logit) for logit in (weight @ row).tolist()]
        z = sum(exps)
        labels = [0.9 * (v == target) + 0.1 / len(exps) for v in range(len(exps))]
        total -= sum(q * math.log(e / z) for q, e in zip(labels, exps))
        total += 0.1 * math.log(z) ** 2
        count += 1
    loss = linear_cross_entropy(hidden, weight, targets, **EVERY_OPTION)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("num_rows", [0, 40], ids=["no rows", "all ignored"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
def test_no_row_that_counts_gives_zero_and_zero_gradients(
    num_rows: int, reduction: str, options: dict[str, Any], either_form: None
) -> None:
    hidden, weight, targets = problem(num_rows)
    bias = torch.zeros(len(weight), requires_grad=True)
    loss = linear_cross_entropy(
        hidden, weight, torch.full_like(targets, -100), bias=bias, reduction=reduction, **options
    )
    assert loss.shape == ((num_rows,) if reduction == "none" else ()) and (loss == 0).all()
    loss.sum().backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()


@pytest.mark.parametrize("form", ["streamed", "captured", "small"])
def test_not_a_number_in_an_ignored_row_reaches_nothing(form: str, request: pytest.FixtureRequest) -> None:
    if form != "small":
        request.getfixturevalue(form)
    hidden, weight, targets = problem()
    expected = evaluate(linear_cross_entropy, named(hidden, weight, targets), WRT)
    with torch.no_grad():
        hidden[targets == -100] = math.nan
    got = evaluate(linear_cross_entropy, named(hidden, weight, targets), WRT)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("target", [70, -1, 1 << 40])
def test_a_target_outside_the_vocabulary_is_refused_by_value(target: int, either_form: None) -> None:
    hidden, weight, targets = problem()
    targets[4] = target
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, 70\) or be .* -100, got {target}$"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("form", ["streamed", "captured"])
def test_a_target_outside_the_vocabulary_that_is_not_looked_at_makes_its_row_nan(
    form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where looking would wait for the device."""
    request.getfixturevalue(form)
    monkeypatch.setattr(op, "_check_targets", lambda *args: None)
    hidden, weight, targets = problem()
    expected = linear_cross_entropy(hidden, weight, targets, reduction="none")
    targets[4] = len(weight)
    rows = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert rows[4].isnan()
    others = torch.arange(len(rows)) != 4
    torch.testing.assert_close(rows[others], expected[others])
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.isnan()
    assert torch.autograd.grad(loss, weight)[0].isnan().all()


@pytest.mark.parametrize(
    ("needs", "products"),
    [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)],
    ids=["both", "frozen weight", "frozen hidden", "no gradient"],
)
@pytest.mark.parametrize("num_ignored", [0, 20, 40])
def test_a_frozen_operand_saves_its_product_and_an_ignored_row_all_three(
    needs: tuple[bool, bool], products: int, num_ignored: int, streamed: None
) -> None:
    hidden, weight, _ = (x.detach() for x in problem())
    targets = torch.arange(40)
    targets[:num_ignored] = -100
    with Operations() as seen:
        op._run(hidden, weight, None, targets, torch.ones(40), -100, (0.0, 0.0), (*needs, False))
    assert seen.multiplications == products * (40 - num_ignored) * weight.numel()


@pytest.mark.parametrize("frozen", WRT)
def test_of_a_frozen_operand_no_gradient_is_asked(frozen: str, streamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: dict[str, Any] = named(*problem())
    asked, run = [], op._run
    monkeypatch.setattr(op, "_run", lambda *args: (asked.append(args[-1]), run(*args))[1])
    inputs[frozen].requires_grad_(False)
    linear_cross_entropy(**inputs).backward()
    linear_cross_entropy(**inputs, reduction="none").sum().backward()
    of_other = [frozen != "hidden", frozen != "weight", False]
    assert asked == [of_other, [False] * 3, of_other]


def test_float16_gradients_under_a_loss_scale_do_not_underflow(streamed: None) -> None:
    """A mean's dL/dlogits are near 1e-9 here before the scale, which float16 flushes to zero."""
    hidden, weight, targets = problem(40, dtype=torch.float16)
    shrink = 1e-6
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum() * shrink
        got = torch.autograd.grad(loss * 65536, (hidden, weight))
        wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        gold_loss = linear_cross_entropy_ref(wide[0], wide[1], targets, reduction=reduction).sum()
        gold = torch.autograd.grad(gold_loss * shrink * 65536, wide)
        for grad, expected in zip(got, gold):
            bound = 4 * torch.finfo(torch.float16).eps * expected.abs().max()
            assert (grad.double() - expected).abs().max() <= bound


def named(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"hidden": hidden, "weight": weight, "targets": targets}
