"""What every loss promises beyond the contract that every op obeys."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkernels as mk
from bench.contract import cast_inputs, check, evaluate
from bench.ops import specs
from bench.ops.contrastive import LOSS as CONTRASTIVE
from bench.ops.linear_cross_entropy import BIAS, PLAIN, ROWS
from bench.ops.sigmoid import LABELS
from bench.ops.sigmoid import LOSS as SIGMOID
from bench.ops.statistics import STATS
from bench.ops.token_contrastive import LOSS as TOKENS
from bench.spec import OpSpec, Shape
from mmkernels._device import INTERPRETED
from mmkernels.contrastive import eager as contrastive_eager
from mmkernels.contrastive import op as contrastive_op
from mmkernels.contrastive.blockwise import TILE
from mmkernels.linear_cross_entropy import blockwise as cross_entropy
from mmkernels.linear_cross_entropy import eager as cross_entropy_eager
from mmkernels.sigmoid import blockwise as sigmoid
from mmkernels.sigmoid import eager as sigmoid_eager
from mmkernels.token_contrastive import blockwise as tokens
from mmkernels.token_contrastive import eager as token_eager
from tests.kernels.losses import LOSSES, learned

SPECS = specs()

EPS = torch.finfo(torch.float32).eps
FAMILIES = (
    "contrastive_loss", "token_contrastive_loss", "sigmoid_loss", "linear_cross_entropy", "distillation",
)  # fmt: skip
STATISTICS = {"contrastive": mk.contrastive_stats, "token_contrastive": mk.token_contrastive_stats}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernels at any shape")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("spec", [x for x in SPECS if x.name.startswith(FAMILIES)], ids=lambda spec: spec.name)
def test_the_eager_form_of_small_shapes_obeys_the_contract(spec: OpSpec, device: str) -> None:
    for case, dtype in itertools.product(spec.cases, (*spec.dtypes, torch.float64)):
        check(spec, spec.shapes[-1], case, dtype, device)


@each_loss
def test_other_batch_sizes_compile_without_a_break(name: str, either_form: str) -> None:
    torch._dynamo.reset()
    loss = LOSSES[name]
    compiled = torch.compile(loss.fn, fullgraph=True, backend="aot_eager", dynamic=True)
    # of stored logits, a graph takes another form than eager
    is_stored = name in ("contrastive", "sigmoid", "token_contrastive") and either_form == "eager_form"
    rtol = EPS if is_stored else 0
    for size in (loss.rows - 7, loss.rows, loss.rows + 24):
        inputs = loss.inputs(size)
        torch.testing.assert_close(compiled(*inputs), loss.fn(*inputs), rtol=rtol, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="of a rule that the interpreter does not go by")
@pytest.mark.parametrize(
    ("name", "module"),
    [("contrastive", contrastive_eager), ("sigmoid", sigmoid_eager), ("token_contrastive", token_eager)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_graph_of_other_batch_sizes_goes_by_the_rule_of_a_gpu(
    name: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "may_compose", lambda x: True)
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name].fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (7, 11):
        inputs = LOSSES[name].inputs(size)
        torch.testing.assert_close(compiled(*inputs), LOSSES[name].fn(*inputs))


@each_loss
@each_reduction
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_activation_checkpointing_changes_no_bit(
    name: str, reduction: str, use_reentrant: bool, streamed: None
) -> None:
    loss, runs = LOSSES[name], []
    for is_checkpointed in (False, True):
        inputs = loss.inputs(loss.rows)

        def call(*inputs: Any) -> Tensor:
            return loss.fn(*inputs, reduction=reduction).sum()

        value: Any = checkpoint(call, *inputs, use_reentrant=use_reentrant) if is_checkpointed else call(*inputs)
        value.backward()
        runs.append([x.grad for x in loss.leaves(inputs)])
    assert all(x is not None and torch.equal(x, y) for x, y in zip(*runs, strict=True))


@each_loss
@each_reduction
def test_a_kept_graph_can_be_run_backward_again(name: str, reduction: str, streamed: None) -> None:
    inputs = LOSSES[name].inputs(LOSSES[name].rows)
    loss, leaves = LOSSES[name].fn(*inputs, reduction=reduction).sum(), LOSSES[name].leaves(inputs)
    first, again, tripled = (torch.autograd.grad(by * loss, leaves, retain_graph=True) for by in (1, 1, 3))
    for x, y, z in zip(first, again, tripled, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(3 * x, z)


@each_loss
def test_an_empty_batch_has_loss_zero_and_zero_gradients(name: str, either_form: None) -> None:
    inputs = LOSSES[name].inputs(0)
    loss, leaves = LOSSES[name].fn(*inputs), LOSSES[name].leaves(inputs)
    grads = torch.autograd.grad(loss, leaves)
    assert loss == 0
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, leaves, strict=True))


@each_loss
def test_not_a_number_reaches_the_loss(name: str, either_form: None) -> None:
    loss = LOSSES[name]
    for spoilt in (0, 1) if name == "distillation" else (0,):
        inputs = loss.inputs(loss.rows)
        with torch.no_grad():
            inputs[spoilt][4, ..., 2] = math.nan
        assert loss.fn(*inputs).isnan()
        if loss.is_by_row:
            assert loss.fn(*inputs, reduction="none").isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("name", ["contrastive", "token_contrastive", "sigmoid"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "one element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_reduction
def test_scale_and_bias_get_gradients_in_their_own_shape_and_dtype(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, either_form: None
) -> None:
    a, b, *scalars = LOSSES[name].inputs(LOSSES[name].rows - 7)
    values = (0.5, -2.0)[: len(scalars)]
    ours = [torch.full(shape, x, dtype=dtype, requires_grad=True) for x in values]
    gold = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in values]
    grads = torch.autograd.grad(LOSSES[name].fn(a, b, *ours, reduction=reduction).sum(), ours)
    expected = LOSSES[name].ref(a.double(), b.double(), *gold, reduction=reduction).sum()
    for grad, exact in zip(grads, torch.autograd.grad(expected, gold), strict=True):
        assert (grad.shape, grad.dtype) == (shape, dtype)
        error = (grad.double().reshape(()) - exact).abs()
        assert error <= 4 * max(torch.finfo(dtype).eps, EPS) * exact.abs()


@pytest.mark.parametrize("name", ["contrastive", "token_contrastive", "sigmoid"])
@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_zero_and_negative_scales_have_exact_gradients(name: str, scale: float, either_form: None) -> None:
    a, b, _, *bias = LOSSES[name].inputs(LOSSES[name].rows)
    inputs = learned(*(x.double() for x in (a, b, torch.tensor(scale), *bias)))
    results = []
    for fn in (LOSSES[name].fn, LOSSES[name].ref):
        value = fn(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs)))
    assert results[1][3] != 0
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def towers(name: str, rows: int, cols: int) -> tuple[list[Tensor], Tensor]:
    """Leaves in float64, and the logits between them."""
    a, b, scale = (x.detach().double() for x in LOSSES[name].inputs(max(rows, cols)))
    a, b, scale = learned(a[:rows], b[:cols], scale)
    return [a, b, scale], scale * (a @ b.T if a.ndim == 2 else (a @ b.T).amax(1))


@pytest.mark.parametrize(
    ("name", "reduction"), [*itertools.product(STATISTICS, ("mean", "sum")), ("token_contrastive", "none")]
)
def test_labels_without_a_partner_add_nothing_and_are_not_counted(name: str, reduction: str, either_form: None) -> None:
    inputs, logits = towers(name, 12, 12)
    of_rows, of_cols = torch.arange(12) + 5, torch.arange(12)  # 7 pairs
    rows = F.cross_entropy(logits[:7], of_cols[5:], reduction=reduction)
    cols = F.cross_entropy(logits.T[5:], of_cols[:7], reduction=reduction)
    if reduction == "none":
        rows, cols = F.pad(rows, (0, 5)), F.pad(cols, (5, 0))
    loss, gold = LOSSES[name].fn(*inputs, labels=(of_rows, of_cols), reduction=reduction), (rows + cols) / 2
    torch.testing.assert_close(loss, gold)
    grads = (torch.autograd.grad(x.sum(), inputs) for x in (loss, gold))
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", STATISTICS)
def test_without_any_partner_the_loss_is_zero_and_so_are_its_gradients(name: str, either_form: None) -> None:
    inputs, _ = towers(name, 12, 9)
    loss = LOSSES[name].fn(*inputs, labels=(torch.arange(12), torch.arange(9) - 99))
    assert loss == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=str)
def test_of_no_rows_or_no_columns_statistics_are_minus_infinity_and_gradients_zero(
    name: str, sizes: tuple[int, int], either_form: None
) -> None:
    (a, b, scale), _ = towers(name, *sizes)
    stats = STATISTICS[name](a, b, scale, positives=torch.full((sizes[0],), -1))
    for lse, size in zip((stats.row_lse, stats.col_lse), sizes, strict=True):
        assert lse.shape == (size,) and (lse == -math.inf).all()
    assert stats.positive.shape == (sizes[0],) and not stats.positive.any()
    total = stats.row_lse.sum() + stats.positive.sum()
    assert not any(grad.any() for grad in torch.autograd.grad(total, (a, b)))


A, B = torch.eye(16), 7 * torch.eye(16) + 93
LARGE_LOGITS: dict[str, tuple[Any, ...]] = {
    "contrastive": (A, B, 1.0),
    "token_contrastive": (A[:, None].repeat(1, 3, 1), B, 1.0),
    "linear_cross_entropy": (A, B, torch.arange(16)),
}


@pytest.mark.parametrize("name", LARGE_LOGITS)
def test_a_small_loss_is_not_rounded_to_the_ulps_of_large_logits(name: str, streamed: None) -> None:
    """Logits of 100 and 93, exact in float32: the loss, .014, must not be made of ulps of 100, 8e-6."""
    gold = math.log1p(15 * math.exp(-7))
    assert abs(LOSSES[name].fn(*LARGE_LOGITS[name]).item() - gold) <= 4 * EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("spec", "roundings"), [(CONTRASTIVE, 2), (SIGMOID, 1), (BIAS, 2)], ids=lambda x: getattr(x, "name", "")
)
def test_low_precision_gradients_are_float32_gradients_rounded(
    spec: OpSpec, roundings: int, dtype: torch.dtype, streamed: None
) -> None:
    """Stricter than the contract, whose reference computes its logits in low precision: of dL/dlogits and of the
    result half an epsilon each, of terms no larger than the sum of absolute values, for which the largest gradient
    stands."""
    for case in spec.cases:
        inputs = spec.make_inputs(spec.shapes[-1], case, dtype, 0)
        got = evaluate(spec.op, inputs, spec.differentiable)
        gold = evaluate(spec.ref, cast_inputs(inputs, torch.float64), spec.differentiable)
        for name in (name for name in got if name.startswith("d_") and got[name].ndim):
            # the interpreter cuts bfloat16 off where a GPU rounds it
            cut = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
            bound = cut * roundings * torch.finfo(dtype).eps * gold[name].abs().max()
            assert (got[name].double() - gold[name]).abs().max() <= bound, (case, name)


# a setting that makes a path stream, and a shape a little beyond its tiles
WORDS = {"T": 2 * cross_entropy.ROWS + 2, "D": 8, "V": cross_entropy.COLS + 1}
REAL_TILES: list[tuple[Any, str, OpSpec, dict[str, int], str]] = [
    (contrastive_op, "STORED_LOGITS", STATS, {"M": 1, "N": TILE + 1, "D": 8, "offset": TILE}, "random"),
    (contrastive_op, "STORED_LOGITS", CONTRASTIVE, {"B": TILE + 1, "D": 8}, "trained"),
    (sigmoid_eager, "EAGER_LOGITS", SIGMOID, {"B": sigmoid.TILE + 1, "D": 8}, "trained"),
    (sigmoid_eager, "EAGER_LOGITS", LABELS, {"M": 3, "N": 2 * sigmoid.TILE + 1, "D": 8}, "trained"),
    (cross_entropy_eager, "EAGER_PRODUCT", PLAIN, WORDS, "random"),
    (cross_entropy_eager, "EAGER_PRODUCT", ROWS, WORDS, "random"),
    (token_eager, "EAGER_PRODUCTS", TOKENS, {"M": 257, "Q": 32, "N": 257, "D": 8}, "trained"),
]


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path; thousands of the interpreter's tiles")
@pytest.mark.parametrize(("module", "limit", "spec", "shape", "case"), REAL_TILES, ids=lambda x: getattr(x, "name", ""))
def test_real_tiles_with_ragged_edges_obey_the_contract(
    module: Any, limit: str, spec: OpSpec, shape: Shape, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 0)
    monkeypatch.setattr(tokens, "TILE", 1 << 16)
    monkeypatch.setattr(tokens, "TILE_COLS", 256)
    check(spec, shape, case, torch.float32, seeds=range(2))
