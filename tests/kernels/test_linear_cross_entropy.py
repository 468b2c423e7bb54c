"""What linear cross-entropy promises beyond the contract that every op obeys."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmkernels import linear_cross_entropy, linear_cross_entropy_ref
from mmkernels._contract import cast_inputs, check, evaluate
from mmkernels._device import INTERPRETED
from mmkernels._spec import OpSpec
from mmkernels.linear_cross_entropy import blockwise, op
from mmkernels.linear_cross_entropy.launch import MAX_CHUNK, MIN_CHUNK, chunk_rows
from mmkernels.linear_cross_entropy.spec import BIAS, IGNORED, PLAIN, ROWS, SPECS

WRT = ("hidden", "weight")
EVERY_OPTION: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1}


@pytest.fixture(params=["streamed", "eager_form"])
def either_form(request: pytest.FixtureRequest) -> None:
    """Small shapes both ways: streamed in small tiles, and by the eager form that a CPU takes there."""
    if request.param == "streamed":
        request.getfixturevalue("streamed")


@pytest.fixture
def captured(streamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured: the number of rows that count is not waited for."""
    monkeypatch.setattr(op, "_may_wait", lambda x: False)


def problem(num_rows: int = 40, width: int = 24, vocab: int = 70, dtype: torch.dtype = torch.float32):
    """Leaves hidden and weight, and targets of which every third is ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (num_rows,))
    targets[::3] = -100
    return hidden, weight, targets


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernel at any shape")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_eager_form_of_small_shapes_obeys_the_contract(spec: OpSpec) -> None:
    for case in spec.cases:
        for dtype in (*spec.dtypes, torch.float64):
            check(spec, spec.shapes[-1], case, dtype)


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path; thousands of the interpreter's tiles")
def test_real_tiles_with_ragged_edges_obey_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "EAGER_PRODUCT", 0)
    shape = {"T": 2 * blockwise.ROWS + 2, "D": 8, "V": blockwise.COLS + 1}
    for spec in (PLAIN, ROWS):
        check(spec, shape, "random", torch.float32, seeds=range(2))


@pytest.mark.parametrize("spec", [IGNORED, ROWS], ids=lambda spec: spec.name)
def test_rows_weighted_by_zero_obey_the_contract_as_rows_left_out_do(spec: OpSpec, captured: None) -> None:
    for case, dtype in itertools.product(spec.cases, spec.dtypes):
        check(spec, spec.shapes[-1], case, dtype, seeds=range(4))


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


def test_a_small_loss_keeps_its_digits_beside_large_logits(streamed: None) -> None:
    """Logits of 100 and 93, exact in float32: the loss, .014, must not be made of ulps of 100, 8e-6."""
    hidden, weight = torch.eye(16), 7 * torch.eye(16) + 93
    gold = math.log1p(15 * math.exp(-7))
    loss = linear_cross_entropy(hidden, weight, torch.arange(16))
    assert abs(loss.item() - gold) <= 4 * torch.finfo(torch.float32).eps


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


def test_not_a_number_in_a_row_that_counts_reaches_the_loss(either_form: None) -> None:
    hidden, weight, targets = problem()
    with torch.no_grad():
        hidden[1, 2] = math.nan
    rows = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert rows[1].isnan() and rows.isnan().sum() == 1
    assert linear_cross_entropy(hidden, weight, targets).isnan()


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


class ProductCounter(TorchDispatchMode):
    """Adds up the multiplications of matrix products; torch's own counter knows neither oneDNN's nor `out=`."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "_linear_pointwise"):
            x, y = args[1:3] if name == "addmm" else args[:2]
            self.multiplications += x.numel() * (y.shape[0] if name == "_linear_pointwise" else y.shape[1])
        return func(*args, **(kwargs or {}))


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
    with ProductCounter() as counter:
        op._run(hidden, weight, None, targets, torch.ones(40), -100, (0.0, 0.0), (*needs, False))
    assert counter.multiplications == products * (40 - num_ignored) * weight.numel()


@pytest.mark.parametrize("frozen", WRT)
def test_the_public_function_asks_for_no_gradient_of_a_frozen_operand(
    frozen: str, streamed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    run = op._run
    monkeypatch.setattr(op, "_run", lambda *args: (asked.append(args[-1]), run(*args))[1])
    inputs: dict[str, Any] = named(*problem())
    for no_grad, reduction in itertools.product((False, True), ("mean", "none")):
        asked.clear()
        inputs[frozen].requires_grad_(False)
        with torch.set_grad_enabled(not no_grad):
            loss = linear_cross_entropy(**inputs, reduction=reduction)
        if not no_grad:
            loss.sum().backward()
        none, one = [False] * 3, [frozen != "hidden", frozen != "weight", False]
        forward = one if reduction == "mean" and not no_grad else none
        assert asked == [forward] + [one] * (reduction == "none" and not no_grad)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_are_float32_gradients_rounded(dtype: torch.dtype, streamed: None) -> None:
    """Stricter than the contract, whose reference computes its logits in low precision."""
    for case in BIAS.cases:
        inputs = BIAS.make_inputs(BIAS.shapes[-1], case, dtype, 0)
        got = evaluate(linear_cross_entropy, inputs, BIAS.differentiable)
        gold = evaluate(linear_cross_entropy_ref, cast_inputs(inputs, torch.float64), BIAS.differentiable)
        for name in ("d_hidden", "d_weight", "d_bias"):
            # one rounding of dL/dlogits and one of the result, each half an epsilon of terms no larger than
            # the sum of absolute values; the largest gradient stands for that sum
            bound = 2 * torch.finfo(dtype).eps * gold[name].abs().max()
            assert (got[name].double() - gold[name]).abs().max() <= bound, (case, name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_can_be_run_backward_again(reduction: str, streamed: None) -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    first, second, third = (
        torch.autograd.grad(factor * loss, (hidden, weight), retain_graph=factor < 3) for factor in (1, 2, 3)
    )
    for x, y, z in zip(first, second, third):
        torch.testing.assert_close(2 * x, y)
        torch.testing.assert_close(3 * x, z)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: str, streamed: None) -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    grad = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="autograd"):
        grad.square().sum().backward()


def test_the_registered_ops_pass_opcheck(streamed: None) -> None:
    hidden, weight, targets = problem(5, 3, 7)
    bias = torch.zeros(7, requires_grad=True)
    forward = torch.ops.mmkernels.linear_cross_entropy_fwd.default
    for total, needs in ((True, [True, True, True]), (True, [False, True, False]), (False, [False] * 3)):
        torch.library.opcheck(forward, (hidden, weight, bias, targets, -100, [0.1, 0.1], total, needs))
        torch.library.opcheck(
            forward, (hidden, weight, None, targets, -100, [0.0, 0.0], total, [*needs[:2], False])
        )
    operands = [x.detach() for x in (hidden, weight, bias)]
    args = (*operands, targets, torch.rand(5), -100, [0.1, 0.1], [True, False, True])
    torch.library.opcheck(torch.ops.mmkernels.linear_cross_entropy_bwd.default, args)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool, streamed: None) -> None:
    hidden, weight, targets = problem()
    linear_cross_entropy(hidden, weight, targets).backward()
    plain = [x.grad for x in (hidden, weight)]
    hidden.grad = weight.grad = None
    loss = checkpoint(linear_cross_entropy, hidden, weight, targets, use_reentrant=use_reentrant)
    assert isinstance(loss, Tensor)
    loss.backward()
    for leaf, expected in zip((hidden, weight), plain):
        assert leaf.grad is not None and expected is not None and torch.equal(leaf.grad, expected)


def test_a_second_number_of_rows_compiles_without_a_break(either_form: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (33, 41, 64):
        inputs = problem(num_rows)
        assert torch.equal(compiled(*inputs), linear_cross_entropy(*inputs))


def test_chunks_stay_within_their_bounds() -> None:
    assert blockwise.tile_shape(4096, 32000, 4) == (512, 1024)
    assert blockwise.tile_shape(4096, 64000, 4) == (256, 1024)
    assert blockwise.tile_shape(4096, 1 << 20, 8) == (64, 1024)
    assert blockwise.tile_shape(3, 5, 4) == (3, 5)
    assert chunk_rows(1000) == MAX_CHUNK
    assert chunk_rows(32000) == 2048
    assert chunk_rows(128256) == MIN_CHUNK


H, W, Y = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)


def named(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"hidden": hidden, "weight": weight, "targets": targets}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": H[None]}, r"hidden must be \[T, D\], got shape \[1, 3, 4\]"),
        ({"hidden": H[:, :0], "weight": W[:, :0]}, r"hidden must be at least one wide, got shape \[3, 0\]"),
        ({"hidden": H.int()}, "hidden must be float32, .* got torch.int32"),
        ({"weight": W[:, :2]}, r"weight must be \[V, 4\], as wide as hidden, got shape \[5, 2\]"),
        ({"weight": W[0]}, r"weight must be \[V, 4\], as wide as hidden, got shape \[4\]"),
        ({"weight": W[:0]}, r"weight must have at least one row, got shape \[0, 4\]"),
        ({"weight": W.int()}, "weight must be float32, .* got torch.int32"),
        ({"weight": W.half()}, "weight must have the dtype of hidden, torch.float32, got torch.float16"),
        ({"weight": W.to("meta")}, "weight must be on the device of hidden, cpu, got meta"),
        ({"targets": Y[:2]}, r"targets must be int64 \[3\], got torch.int64 \[2\]"),
        ({"targets": Y.int()}, r"targets must be int64 \[3\], got torch.int32 \[3\]"),
        ({"targets": Y.to("meta")}, "targets must be on the device of hidden, cpu, got meta"),
        ({"bias": W}, r"bias must be \[5\], got shape \[5, 4\]"),
        ({"bias": W[:, 0].half()}, "bias must have the dtype of hidden, torch.float32, got torch.float16"),
        ({"bias": Y[:1].expand(5)}, "bias must be float32, .* got torch.int64"),
        ({"bias": W[:, 0].to("meta")}, "bias must be on the device of hidden, cpu, got meta"),
        ({"label_smoothing": 1.1}, r"label_smoothing must be in \[0, 1\], got 1.1"),
        ({"label_smoothing": math.nan}, r"label_smoothing must be in \[0, 1\], got nan"),
        ({"z_loss": -1.0}, "z_loss must be finite and at least 0, got -1.0"),
        ({"z_loss": math.inf}, "z_loss must be finite and at least 0, got inf"),
        ({"reduction": "max"}, "reduction must be one of none, sum, mean, got max"),
    ],
)
def test_bad_input_is_refused_by_name_contract_and_value(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}$"):
        linear_cross_entropy(**{**named(H, W, Y), **changed})


@pytest.mark.gpu
def test_the_compiled_kernel_is_exact_at_real_shapes() -> None:
    for spec, dtype in itertools.product((PLAIN, ROWS), (torch.float32, torch.bfloat16, torch.float16)):
        check(spec, {"T": 2500, "D": 512, "V": 32001}, "random", dtype, "cuda", seeds=range(2))


@pytest.mark.gpu
def test_the_compiled_kernel_replays_in_a_cuda_graph_for_other_targets() -> None:
    hidden, weight, targets = (x.detach().cuda() for x in problem(300))
    hidden.requires_grad_()
    static = targets.clone()
    for _ in range(2):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, static), hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_cross_entropy(hidden, weight, static)
        grad = torch.autograd.grad(loss, hidden)[0]
    static.copy_(targets.roll(1))
    graph.replay()
    expected = linear_cross_entropy(hidden, weight, static)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, hidden)[0])


@pytest.mark.gpu
def test_the_gpu_path_waits_for_the_device_once_and_marks_a_target_outside_the_vocabulary() -> None:
    hidden, weight, targets = problem(300)
    hidden, weight = (x.detach().cuda().requires_grad_() for x in (hidden, weight))
    targets = targets.cuda()
    linear_cross_entropy(hidden, weight, targets).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroni") as waits:
            linear_cross_entropy(hidden, weight, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
    targets[4] = len(weight)
    rows = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert rows[4].isnan() and rows.isnan().sum() == 1
