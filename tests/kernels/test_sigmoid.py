"""What the sigmoid loss promises beyond the contract that every op obeys."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkernels import sigmoid_loss, sigmoid_loss_ref
from mmkernels._contract import cast_inputs, check, evaluate
from mmkernels._device import INTERPRETED
from mmkernels._launch import MAX_CHUNK, MIN_CHUNK, chunk_rows
from mmkernels.sigmoid import blockwise, op
from mmkernels.sigmoid.spec import CASES, LABELS, LOSS, ROWS

EPS = torch.finfo(torch.float32).eps
of_the_blockwise_path = pytest.mark.skipif(INTERPRETED, reason="of the blockwise path")


@pytest.fixture(params=["streamed", "eager_form"])
def either_form(request: pytest.FixtureRequest) -> None:
    """Small shapes both ways: streamed in small tiles, and by the eager form that a CPU takes there."""
    if request.param == "streamed":
        request.getfixturevalue("streamed")


def features(*sizes: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    return [(scale * torch.randn(size, 24)).to(dtype).requires_grad_() for size in sizes]


def scalars() -> list[Tensor]:
    return [torch.tensor(x, requires_grad=True) for x in (0.7, -3.0)]


@of_the_blockwise_path
@pytest.mark.parametrize("spec", [LOSS, ROWS, LABELS], ids=lambda spec: spec.name)
def test_the_eager_form_of_small_shapes_obeys_the_contract(spec) -> None:
    for case, dtype in itertools.product(CASES, (*spec.dtypes, torch.float64)):
        check(spec, spec.shapes[-1], case, dtype, seeds=range(4))


@of_the_blockwise_path
def test_real_tiles_with_ragged_edges_obey_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "EAGER_LOGITS", 0)
    check(LOSS, {"B": blockwise.TILE + 1, "D": 8}, "trained", torch.float32, seeds=range(2))
    check(LABELS, {"M": 3, "N": 2 * blockwise.TILE + 1, "D": 8}, "trained", torch.float32, seeds=range(2))


def test_the_loss_is_the_papers_pseudocode(either_form: None) -> None:
    """Algorithm 1 of arXiv:2303.15343, entry by entry in double precision."""
    a, b = features(5, 5)
    total = 0.0
    for i, j in itertools.product(range(5), range(5)):
        logit = 0.7 * math.fsum(x * y for x, y in zip(a[i].tolist(), b[j].tolist())) - 3.0
        sign = 1.0 if i == j else -1.0
        total -= math.log(1 / (1 + math.exp(-sign * logit)))
    assert abs(sigmoid_loss(a, b, 0.7, -3.0).item() - total / 5) <= 8 * EPS * total / 5


def test_reductions_are_sums_of_the_rows_and_the_mean_is_over_rows(either_form: None) -> None:
    a, b = features(40, 40)
    rows = sigmoid_loss(a, b, 0.7, -3.0, reduction="none")
    total = sigmoid_loss(a, b, 0.7, -3.0, reduction="sum")
    assert rows.shape == (40,)
    assert abs(total - rows.sum()) <= 4 * EPS * total
    assert torch.equal(sigmoid_loss(a, b, 0.7, -3.0), total / 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients_of_each_row_with_labels_are_the_references(
    dtype: torch.dtype, either_form: None
) -> None:
    inputs = LABELS.make_inputs({"M": 50, "N": 70, "D": 9}, "trained", dtype, 0) | {"reduction": "none"}
    got = evaluate(sigmoid_loss, inputs, LABELS.differentiable)
    gold = evaluate(sigmoid_loss_ref, cast_inputs(inputs, torch.float64), LABELS.differentiable)
    for name, value in got.items():
        error = (value - gold[name]).abs().max()
        assert error <= 32 * torch.finfo(dtype).eps * gold[name].abs().max(), name


def test_unique_labels_in_order_are_the_diagonal(either_form: None) -> None:
    inputs = LOSS.make_inputs({"B": 40, "D": 9}, "trained", torch.float32, 0)
    plain = evaluate(sigmoid_loss, inputs, LOSS.differentiable)
    labels = torch.arange(40).mul(1 << 40), torch.arange(40).mul(1 << 40)
    for name, value in evaluate(sigmoid_loss, inputs | {"labels": labels}, LOSS.differentiable).items():
        torch.testing.assert_close(value, plain[name], rtol=16 * EPS, atol=16 * EPS)


def test_blocks_of_ranks_add_up_to_the_whole_batch(either_form: None) -> None:
    """Data parallelism: each rank's rows against all columns, its place told by labels."""
    a, b = features(60, 60)
    ids = torch.arange(60)
    blocks = [slice(first, first + 20) for first in (0, 20, 40)]
    loss = torch.stack(
        [sigmoid_loss(a[rows], b, 0.7, -3.0, labels=(ids[rows], ids)) for rows in blocks]
    ).mean()
    whole = sigmoid_loss_ref(a, b, 0.7, -3.0)
    torch.testing.assert_close(loss, whole)
    for grad, expected in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(whole, (a, b))):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_are_float32_gradients_rounded(dtype: torch.dtype, streamed: None) -> None:
    """Stricter than the contract, whose reference computes its logits in low precision."""
    for case in CASES:
        inputs = LOSS.make_inputs({"B": 67, "D": 17}, case, dtype, 0)
        got = evaluate(sigmoid_loss, inputs, LOSS.differentiable)
        gold = evaluate(sigmoid_loss_ref, cast_inputs(inputs, torch.float64), LOSS.differentiable)
        for name in ("d_a", "d_b"):
            error = (got[name].double() - gold[name]).abs().max()
            assert error <= torch.finfo(dtype).eps * gold[name].abs().max(), (case, name)


def test_gradients_of_faint_negatives_survive_float16(streamed: None) -> None:
    """At bias -14 a negative's dL/dx is 8e-7, fourteen of float16's smallest steps, and the mean divides by B again:
    here the negatives are all of the gradient of `a`."""
    a, b = (x.detach().half().requires_grad_() for x in features(70, 70, scale=0.01))
    ids = torch.arange(70)
    loss = sigmoid_loss(a, b, 1.0, -14.0, labels=(ids, ids + 70))
    grad, *_ = torch.autograd.grad(2.0**18 * loss, a)
    wide = a.detach().double().requires_grad_()
    gold, *_ = torch.autograd.grad(
        2.0**18 * sigmoid_loss_ref(wide, b.double(), 1.0, -14.0, labels=(ids, ids + 70)), wide
    )
    assert (grad.double() - gold).abs().max() <= torch.finfo(torch.float16).eps * gold.abs().max()


def test_faint_losses_keep_their_relative_precision(either_form: None) -> None:
    """log(1 + t) in place of log1p(t) would err by a quarter here."""
    zeros, ids = torch.zeros(3, 4), torch.arange(3)
    loss = sigmoid_loss(zeros, zeros, 1.0, -15.0, labels=(ids, ids + 3), reduction="sum")
    gold = 9 * math.log1p(math.exp(-15))
    assert abs(loss.item() - gold) <= 8 * EPS * gold


def test_logits_of_a_thousand_have_exact_losses_and_gradients(either_form: None) -> None:
    a = torch.eye(40).requires_grad_()
    b = (-torch.eye(40)).requires_grad_()
    loss = sigmoid_loss(a, b, 1000.0, 0.0, reduction="none")
    # the positive's is -1000; each of the 39 negatives' is 0
    torch.testing.assert_close(loss, torch.full((40,), 1000 + 39 * math.log(2)), rtol=4 * EPS, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), a)
    torch.testing.assert_close(
        grad, torch.where(torch.eye(40) > 0, 1000.0, -500.0), rtol=4 * EPS, atol=0, msg=str(grad)
    )


def test_the_sum_over_many_tiles_does_not_drift(streamed: None) -> None:
    """625 tiles of one value: summed in float32, a tile after a tile, the total would lose more than this."""
    zeros, ids = torch.zeros(20_000, 1), torch.arange(20_000)
    loss = sigmoid_loss(zeros[:1], zeros, 1.0, -3.0, labels=(ids[:1] - 1, ids), reduction="sum")
    gold = 20_000 * math.log1p(math.exp(-3))
    assert abs(loss.item() - gold) <= 2 * EPS * gold


def test_the_scales_gradient_is_exact_where_its_terms_cancel(streamed: None) -> None:
    """All cosines are 1: the gradients of scale and bias are the same sum, which vanishes at its minimum."""
    ones = torch.ones(64, 1)
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-2 - math.log(63), requires_grad=True)
    for grad in torch.autograd.grad(sigmoid_loss(ones, ones, scale, bias), (scale, bias)):
        assert abs(grad) <= 8 * EPS


def test_an_empty_batch_has_loss_zero_and_zero_gradients(either_form: None) -> None:
    a, b = features(0, 0)
    scale, bias = scalars()
    sigmoid_loss(a, b, scale, bias).backward()
    assert scale.grad is not None and bias.grad is not None and a.grad is not None
    assert scale.grad.item() == bias.grad.item() == 0
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=str)
def test_rows_or_columns_alone_have_no_loss(sizes: tuple[int, int], either_form: None) -> None:
    a, b = features(*sizes)
    labels = torch.arange(sizes[0]), torch.arange(sizes[1])
    loss = sigmoid_loss(a, b, 0.7, -3.0, labels=labels, reduction="none")
    assert torch.equal(loss, torch.zeros(sizes[0]))
    total = sigmoid_loss(a, b, 0.7, -3.0, labels=labels, reduction="sum")
    assert total.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(total, (a, b)))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "one element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scale_and_bias_get_gradients_in_their_own_shape_and_dtype(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str, either_form: None
) -> None:
    a, b = features(33, 33)
    scale, bias = (torch.full(shape, x, dtype=dtype, requires_grad=True) for x in (0.5, -2.0))
    gold = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, -2.0)]
    grads = torch.autograd.grad(sigmoid_loss(a, b, scale, bias, reduction=reduction).sum(), (scale, bias))
    expected = torch.autograd.grad(
        sigmoid_loss_ref(a.double(), b.double(), *gold, reduction=reduction).sum(), gold
    )
    for grad, exact in zip(grads, expected):
        assert (grad.shape, grad.dtype) == (shape, dtype)
        error = (grad.double().reshape(()) - exact).abs()
        assert error <= 4 * max(torch.finfo(dtype).eps, EPS) * exact.abs()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool, reduction: str, streamed: None) -> None:
    inputs = (*features(40, 40), *scalars())

    def loss(*inputs: Tensor) -> Tensor:
        return sigmoid_loss(*inputs, reduction=reduction).sum()

    def grads(value: object) -> list[Tensor]:
        assert isinstance(value, Tensor)
        value.backward()
        return [x.grad.clone() for x in inputs if x.grad is not None]

    plain = grads(loss(*inputs))
    for x in inputs:
        x.grad = None
    again = grads(checkpoint(loss, *inputs, use_reentrant=use_reentrant))
    assert len(plain) == 4
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_backward_twice_gives_the_same_gradients(streamed: None) -> None:
    inputs = (*features(40, 40), *scalars())
    loss = sigmoid_loss(*inputs)
    first, second = (torch.autograd.grad(3 * loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_a_second_derivative_is_refused(streamed: None) -> None:
    inputs = (*features(40, 40), *scalars())
    (grad,) = torch.autograd.grad(sigmoid_loss(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_the_registered_ops_pass_opcheck(streamed: None) -> None:
    a, b = features(5, 7)
    scale, bias = torch.tensor([2.0], requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    ids = torch.arange(7)
    for total, needs in ((True, [True] * 4), (True, [False, True, False, True]), (False, [False] * 4)):
        args = (a, b, scale, bias, ids[:5], ids, total, needs)
        torch.library.opcheck(torch.ops.mmkernels.sigmoid_fwd.default, args)
    args = (b, b, scale, bias, None, None, True, [True] * 4)
    torch.library.opcheck(torch.ops.mmkernels.sigmoid_fwd.default, args)
    plain = [x.detach() for x in (a, b, scale, bias)]
    for needs in ([True] * 4, [False, True, False, True]):
        args = (*plain, ids[:5], ids, torch.ones(5), needs)
        torch.library.opcheck(torch.ops.mmkernels.sigmoid_bwd.default, args)


def test_a_second_batch_size_compiles_without_a_break(streamed: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (33, 41, 64):
        a, b = features(size, size)
        assert torch.equal(compiled(a, b, 2.0, -3.0), sigmoid_loss(a, b, 2.0, -3.0))


def test_not_a_number_in_a_feature_reaches_the_loss_of_its_row(either_form: None) -> None:
    a, b = features(40, 40)
    with torch.no_grad():
        a[3, 2] = math.nan
    loss = sigmoid_loss(a, b, 2.0, -3.0, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[3]]
    assert sigmoid_loss(a, b, 2.0, -3.0).isnan()


def test_chunks_of_the_gradient_stay_within_their_bounds() -> None:
    assert chunk_rows(1024, 2) == MAX_CHUNK
    assert chunk_rows(65536, 2) == 2048
    assert chunk_rows(1 << 20, 4) == MIN_CHUNK


A, IDS = torch.ones(3, 4), torch.arange(3)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((A[0], A, 1.0, 0.0), {}, r"a must be \[M, D\], got shape \[4\]"),
        ((A[:, :0], A[:, :0], 1.0, 0.0), {}, r"a must be at least one wide, got shape \[3, 0\]"),
        ((A, A[:, :2], 1.0, 0.0), {}, r"b must be \[N, 4\], as wide as a, got shape \[3, 2\]"),
        ((A, A[None], 1.0, 0.0), {}, r"b must be \[N, 4\], as wide as a, got shape \[1, 3, 4\]"),
        ((A, A.to("meta"), 1.0, 0.0), {}, "b must be on the device of a, cpu, got meta"),
        ((A, A.half(), 1.0, 0.0), {}, "b must have the dtype of a, torch.float32, got torch.float16"),
        ((A.int(), A.int(), 1.0, 0.0), {}, "a must be float32, .* got torch.int32"),
        ((A, A.int(), 1.0, 0.0), {}, "b must be float32, .* got torch.int32"),
        (
            (A, A[:2], 1.0, 0.0),
            {},
            r"b must have the shape of a, \[3, 4\], where there are no labels, got \[2, 4\]",
        ),
        ((A, A, math.inf, 0.0), {}, "logit_scale must be finite, got inf"),
        ((A, A, torch.ones(2), 0.0), {}, r"logit_scale must be a float or .* element, got shape \[2\]"),
        ((A, A, 1.0, math.nan), {}, "logit_bias must be finite, got nan"),
        ((A, A, 1.0, torch.tensor(math.nan)), {}, "logit_bias must be finite, got nan"),
        ((A, A, 1.0, torch.tensor(1)), {}, "logit_bias must be floating point, got torch.int64"),
        (
            (A, A, 1.0, torch.ones((), device="meta")),
            {},
            "logit_bias must be on the device of a, cpu, got meta",
        ),
        (
            (A, A, 1.0, 0.0),
            {"labels": (IDS[:2], IDS)},
            r"labels\[0\] must be int64 \[3\], got torch.int64 \[2\]",
        ),
        (
            (A, A, 1.0, 0.0),
            {"labels": (IDS, IDS.int())},
            r"labels\[1\] must be int64 \[3\], got torch.int32 \[3\]",
        ),
        (
            (A, A, 1.0, 0.0),
            {"labels": (IDS, IDS.to("meta"))},
            r"labels\[1\] must be on the device of a, cpu, got meta",
        ),
        ((A, A, 1.0, 0.0), {"reduction": "rows"}, "reduction must be one of none, sum, mean, got rows"),
    ],
)
def test_bad_input_is_refused_by_name_contract_and_value(args, kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=f"^sigmoid_loss: {message}$"):
        sigmoid_loss(*args, **kwargs)


@pytest.mark.gpu
def test_the_compiled_kernel_is_exact_at_real_shapes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(LOSS, {"B": 1031, "D": 512}, "trained", dtype, "cuda", seeds=range(2))
        check(LABELS, {"M": 520, "N": 1031, "D": 512}, "trained", dtype, "cuda", seeds=range(2))


@pytest.mark.gpu
def test_forward_and_backward_replay_in_a_cuda_graph() -> None:
    a, b = (F.normalize(x.detach().cuda(), dim=1).requires_grad_() for x in features(300, 300))
    scale, bias = (x.detach().cuda().requires_grad_() for x in scalars())
    ids = torch.arange(300, device="cuda") % 70

    def run() -> list[Tensor]:
        of_diagonal = sigmoid_loss(a, b, scale, bias)
        of_labels = sigmoid_loss(a, b, scale, bias, labels=(ids, ids), reduction="none")
        loss = of_diagonal + of_labels.sum()
        return [loss.detach(), *torch.autograd.grad(loss, (a, b, scale, bias))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


@pytest.mark.gpu
def test_the_gpu_path_never_waits_for_the_device() -> None:
    a, b = (x.detach().cuda().requires_grad_() for x in features(300, 300))
    scale, bias = (x.detach().cuda().requires_grad_() for x in scalars())
    ids = torch.arange(300, device="cuda") % 70

    def run() -> None:
        sigmoid_loss(a, b, scale, bias).backward()
        sigmoid_loss(a, b, scale, bias, labels=(ids, ids), reduction="none").sum().backward()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
