"""What the contrastive ops promise beyond the contract that every op obeys."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmkernels import contrastive_loss, contrastive_loss_ref, contrastive_stats, contrastive_stats_ref
from mmkernels._contract import cast_inputs, check, evaluate
from mmkernels._device import INTERPRETED, runs_triton
from mmkernels._spec import OpSpec
from mmkernels.contrastive import blockwise, kernel, loss, op
from mmkernels.contrastive.problem import Problem
from mmkernels.contrastive.spec import CASES, LOSS, STATS, VARIANTS


# the interpreter runs the kernels alone
@pytest.fixture(params=["streamed"] if INTERPRETED else ["streamed", "eager_form"])
def either_form(request: pytest.FixtureRequest) -> None:
    """Small shapes both ways: streamed in small tiles, and by the eager form that a CPU takes there."""
    if request.param == "streamed":
        request.getfixturevalue("streamed")


def features(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, 24).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernels alone")
@pytest.mark.parametrize("spec", [LOSS, *VARIANTS], ids=lambda spec: spec.name)
def test_the_eager_form_of_small_shapes_obeys_the_contract(spec: OpSpec) -> None:
    for case, dtype in itertools.product(spec.cases, (*spec.dtypes, torch.float64)):
        check(spec, spec.shapes[-1], case, dtype)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps no logits")
@pytest.mark.parametrize("spec", [STATS, *VARIANTS], ids=lambda spec: spec.name)
def test_statistics_whose_logits_are_kept_obey_the_contract(
    spec: OpSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "TILE", 32)
    monkeypatch.setattr(loss, "EAGER_LOGITS", 0)
    for case, dtype in itertools.product(spec.cases, (*spec.dtypes, torch.float64)):
        for shape in spec.shapes:
            check(spec, shape, case, dtype)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps no logits")
@pytest.mark.parametrize("has_teacher", [False, True])
def test_kept_logits_are_computed_once_and_serve_a_second_backward(
    has_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, *teacher = features(40, 56, 40, 56)
    computed: list[int] = []
    for module in (op, blockwise):
        product = module.matmul_nt
        monkeypatch.setattr(module, "matmul_nt", lambda *xs, f=product: computed.append(1) or f(*xs))
    stats = contrastive_stats(
        a, b, 2.0, positives=torch.arange(40), teacher=(teacher[0], teacher[1]) if has_teacher else None
    )
    total = torch.stack([x.sum() for x in stats[:5]]).sum()
    first = torch.autograd.grad(total, (a, b), retain_graph=True)
    # the teacher's in both passes
    assert len(computed) == (3 if has_teacher else 1)
    second = torch.autograd.grad(total, (a, b))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path; thousands of the interpreter's tiles")
def test_real_tiles_with_ragged_edges_obey_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "STORED_LOGITS", 0)
    shape = {"M": 1, "N": blockwise.TILE + 1, "D": 8, "offset": blockwise.TILE}
    check(STATS, shape, "random", torch.float32, seeds=range(2))
    check(LOSS, {"B": blockwise.TILE + 1, "D": 8}, "trained", torch.float32, seeds=range(2))


def test_a_row_of_negative_cosines_at_scale_100_has_exact_statistics(streamed: None) -> None:
    inputs = STATS.make_inputs({"M": 64, "N": 80, "D": 32, "offset": 3}, "negative_row", torch.float64, 0)
    assert (inputs["a"][0] @ inputs["b"].T).max() < -0.3
    row_lse = contrastive_stats(**cast_inputs(inputs, torch.float32)).row_lse
    gold = contrastive_stats_ref(**inputs)[0]
    assert gold[0] < -30
    assert abs(row_lse[0].double() - gold[0]) <= 8 * torch.finfo(torch.float32).eps * abs(gold[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_are_float32_gradients_rounded(dtype: torch.dtype, streamed: None) -> None:
    """Stricter than the contract, whose reference computes its logits in low precision."""
    for case in CASES:
        inputs = LOSS.make_inputs({"B": 67, "D": 17}, case, dtype, 0)
        got = evaluate(contrastive_loss, inputs, LOSS.differentiable)
        gold = evaluate(contrastive_loss_ref, cast_inputs(inputs, torch.float64), LOSS.differentiable)
        for name in ("d_a", "d_b"):
            # one rounding of dL/dS and one of the result, each half an epsilon of terms no larger than the
            # sum of absolute values; the largest gradient stands for that sum
            bound = 2 * torch.finfo(dtype).eps * gold[name].abs().max()
            assert (got[name].double() - gold[name]).abs().max() <= bound, (case, name)


def test_float16_gradients_of_a_huge_batch_do_not_underflow() -> None:
    """At B = 65536 each dL/dS is near 1e-10, which float16 flushes to zero unless it is moved up first."""
    a, b = (x.detach() for x in features(40, 40, dtype=torch.float16))
    tiny, none = torch.full((40,), 1e-8), torch.zeros(0)
    problem = Problem(a, b, torch.tensor(0.1), torch.arange(40), None, None, True)
    for path in (blockwise, kernel) if kernel_runs() else (blockwise,):
        stats = path.contrastive_fwd(problem)
        grads = [tiny, tiny, tiny * 0, none, none]
        _, db, _ = path.contrastive_bwd(problem, stats, grads, (False, True, False))
        p, q = (torch.softmax(0.1 * a.double() @ b.double().T, dim) for dim in (1, 0))
        gold = 0.1 * 1e-8 * (p + q).T @ a.double()
        assert db is not None
        assert (db.double() - gold).abs().max() <= 4 * torch.finfo(torch.float16).eps * gold.abs().max()


def kernel_runs() -> bool:
    return runs_triton(torch.empty(0))


def test_loss_is_the_reference_and_zero_at_one_pair(either_form: None) -> None:
    a, b = features(33, 33)
    torch.testing.assert_close(contrastive_loss(a, b, 3.0), contrastive_loss_ref(a, b, 3.0))
    assert contrastive_loss(a[:1], b[:1], 3.0).item() == 0


def test_a_small_loss_is_not_rounded_to_the_ulps_of_large_logits(streamed: None) -> None:
    """Logits of 100 and 93, exact in float32: the loss, .014, must not be made of ulps of 100, 8e-6."""
    a, b = torch.eye(16), 7 * torch.eye(16) + 93
    gold = math.log1p(15 * math.exp(-7))
    assert abs(contrastive_loss(a, b, 1.0).item() - gold) <= 4 * torch.finfo(torch.float32).eps


def test_an_empty_batch_has_loss_zero_and_zero_gradients(either_form: None) -> None:
    a, b = features(0, 0)
    scale = torch.tensor(3.0, requires_grad=True)
    loss = contrastive_loss(a, b, scale)
    loss.backward()
    assert loss.item() == 0
    assert scale.grad is not None and scale.grad.item() == 0
    assert a.grad is not None and a.grad.shape == a.shape


def test_no_rows_against_some_columns_give_empty_rows_and_minus_infinity(either_form: None) -> None:
    a, b = features(0, 3)
    stats = contrastive_stats(a, b, 3.0)
    assert stats.row_lse.shape == (0,)
    assert (stats.col_lse == -math.inf).all()
    stats.row_lse.sum().backward()
    assert b.grad is not None and (b.grad == 0).all()


def test_rows_against_no_columns_have_minus_infinity_and_zero_gradients(either_form: None) -> None:
    a, b = features(3, 0)
    stats = contrastive_stats(a, b, 3.0, positives=torch.full((3,), -1, device=a.device))
    assert (stats.row_lse == -math.inf).all() and (stats.positive == 0).all()
    stats.positive.sum().backward()
    assert a.grad is not None and (a.grad == 0).all()


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "one element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_scale_gets_its_gradient_in_its_own_shape_and_dtype(
    shape: tuple[int, ...], dtype: torch.dtype, either_form: None
) -> None:
    a, b = features(33, 33)
    scale = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
    contrastive_loss(a, b, scale).backward()
    assert scale.grad is not None
    assert (scale.grad.shape, scale.grad.dtype) == (scale.shape, dtype)
    gold = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    contrastive_loss_ref(a.double(), b.double(), gold).backward()
    assert gold.grad is not None
    torch.testing.assert_close(scale.grad.double().reshape(()), gold.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_zero_and_negative_scales_have_exact_gradients(scale: float, either_form: None) -> None:
    inputs = LOSS.make_inputs({"B": 40, "D": 9}, "random", torch.float64, 0) | {
        "logit_scale": torch.tensor(scale, dtype=torch.float64)
    }
    got = evaluate(contrastive_loss, inputs, LOSS.differentiable)
    gold = evaluate(contrastive_loss_ref, inputs, LOSS.differentiable)
    assert gold["d_logit_scale"] != 0
    for name, value in got.items():
        torch.testing.assert_close(value, gold[name], rtol=1e-10, atol=1e-12)


def test_blocks_of_ranks_add_up_to_the_whole_batch(either_form: None) -> None:
    """Data parallelism: each rank's rows against all columns, column sums combined by log-sum-exp."""
    a, b = features(60, 60)
    parts = [
        contrastive_stats(a[first : first + 20], b, torch.tensor(0.7), positives=torch.arange(20) + first)
        for first in (0, 20, 40)
    ]
    row_lse = torch.cat([part.row_lse for part in parts])
    positive = torch.cat([part.positive for part in parts])
    col_lse = torch.stack([part.col_lse for part in parts]).logsumexp(0)
    loss = ((row_lse + col_lse) / 2 - positive).mean()
    grads = torch.autograd.grad(loss, (a, b))
    whole = contrastive_loss_ref(a, b, 0.7)
    torch.testing.assert_close(loss, whole)
    for grad, expected in zip(grads, torch.autograd.grad(whole, (a, b))):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


class ProductCounter(TorchDispatchMode):
    """Counts matrix products; torch's own counter leaves in-place ones out."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket.__name__ in ("mm", "_linear_pointwise")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needs", "products"),
    [((True, True, True), 3), ((True, False, False), 2), ((False, True, True), 2), ((False, False, True), 1)],
)
def test_a_gradient_that_nobody_asked_for_costs_no_product(
    needs: tuple[bool, bool, bool], products: int
) -> None:
    a, b = (x.detach() for x in features(40, 40))
    ones, none = torch.ones(40), torch.zeros(0)
    problem = Problem(a, b, torch.tensor(1.0), torch.arange(40), None, None, True)
    stats = blockwise.contrastive_fwd(problem)
    with ProductCounter() as counter:
        results = blockwise.contrastive_bwd(problem, stats, [ones, ones, ones, none, none], needs)
    assert counter.products == products
    assert tuple(result is not None for result in results) == needs


@pytest.mark.parametrize("with_everything", [False, True])
def test_the_registered_ops_pass_opcheck(with_everything: bool, streamed: None) -> None:
    a, b = features(5, 7)
    scale = torch.tensor([2.0], requires_grad=True)
    options = (None, None, None, False)
    if with_everything:
        options = (torch.arange(5), *(torch.randn_like(x) for x in (a, b)), True)
    keep = with_everything and not INTERPRETED
    args = (a, b, scale, *options, False, keep)
    torch.library.opcheck(torch.ops.mmkernels.contrastive_fwd.default, args)
    *stats, cosines = (x.detach() for x in torch.ops.mmkernels.contrastive_fwd(*args))
    grads = [torch.ones_like(x) for x in stats[:5]]
    for needs in ([True, True, True], [False, True, False]):
        args = (
            a.detach(),
            b.detach(),
            scale.detach(),
            *options,
            stats,
            grads,
            needs,
            cosines if keep else None,
        )
        torch.library.opcheck(torch.ops.mmkernels.contrastive_bwd.default, args)


def test_activation_checkpointing_changes_no_bit(streamed: None) -> None:
    a, b = features(40, 40)
    plain = torch.autograd.grad(contrastive_loss(a, b, 2.0), (a, b))
    loss = checkpoint(contrastive_loss, a, b, 2.0, use_reentrant=False)
    assert isinstance(loss, Tensor)
    again = torch.autograd.grad(loss, (a, b))
    assert all(torch.equal(x, y) for x, y in zip(plain, again))


def test_a_second_batch_size_compiles_without_a_break(streamed: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (33, 41, 64):
        a, b = features(size, size)
        assert torch.equal(compiled(a, b, 2.0), contrastive_loss(a, b, 2.0))


def test_not_a_number_in_a_feature_reaches_the_loss(either_form: None) -> None:
    a, b = features(40, 40)
    with torch.no_grad():
        a[3, 2] = math.nan
    assert contrastive_loss(a, b, 2.0).isnan()


@pytest.mark.gpu
def test_the_compiled_kernel_is_exact_at_real_shapes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(LOSS, {"B": 1031, "D": 512}, "trained", dtype, "cuda", seeds=range(2))


@pytest.mark.gpu
def test_the_compiled_kernel_replays_in_a_cuda_graph() -> None:
    a, b = (F.normalize(x.detach().cuda(), dim=1) for x in features(300, 300))
    scale = torch.tensor(20.0, device="cuda")
    expected = contrastive_loss(a, b, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = contrastive_loss(a, b, scale)
    graph.replay()
    assert torch.equal(loss, expected)


@pytest.mark.gpu
def test_the_gpu_path_never_waits_for_the_device() -> None:
    a, b = (x.detach().cuda().requires_grad_() for x in features(300, 300))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    contrastive_loss(a, b, scale).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contrastive_loss(a, b, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
