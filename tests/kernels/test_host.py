"""What the host does on a GPU, by the fake driver: launches that CUDA takes, few compiles, calls and waits."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mk
from bench.contract import check
from bench.ops import specs
from bench.spec import OpSpec
from mmkernels._launch import MOST_PROGRAMS
from mmkernels.linear_cross_entropy import kernel
from mmkernels.linear_cross_entropy import op as cross_entropy
from tests.kernels.fake_driver import FAKED, FakeGpu, Recorded, host_times, without_data
from tests.kernels.losses import LOSSES

pytestmark = pytest.mark.skipif(not FAKED, reason="needs triton's driver, not its interpreter")

Call = Callable[[], Any]
grad = torch.autograd.grad
kernels_alone = pytest.mark.usefixtures("kernels_alone")
DTYPE = torch.bfloat16
D = 64


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with FakeGpu() as gpu:
        yield gpu


def leaf(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=device).requires_grad_()


def number(value: float, device: str) -> Tensor:
    return torch.full((), value, device=device).requires_grad_()


def ids(rows: int, device: str, kinds: int = 9) -> Tensor:
    return torch.arange(rows, device=device) % kinds


def contrastive(n: int, device: str, **options: Any) -> Call:
    a, b, scale = leaf(n, D, device=device), leaf(n, D, device=device), number(10.0, device)
    return lambda: grad(mk.contrastive_loss(a, b, scale, **options).sum(), (a, b, scale))


def labelled(n: int, device: str) -> Call:
    return contrastive(n, device, labels=(ids(n, device), ids(n, device)), label_smoothing=0.1)


def momentum(n: int, device: str) -> Call:
    """With a queue of a fixed size."""
    teacher = leaf(n, D, device=device).detach(), leaf(n, D, device=device).detach()
    queue = leaf(1000, D, device=device).detach()
    return contrastive(n, device, teacher=teacher, negatives=queue, alpha=0.4, symmetric=False)


def sigmoid(n: int, device: str) -> Call:
    a, b = leaf(n, D, device=device), leaf(n, D, device=device)
    scale, bias = number(10.0, device), number(-10.0, device)
    return lambda: grad(mk.sigmoid_loss(a, b, scale, bias), (a, b, scale, bias))


def tokens(n: int, device: str) -> Call:
    q, b, scale = leaf(n, 32, D, device=device), leaf(n, D, device=device), number(10.0, device)
    return lambda: grad(mk.token_contrastive_loss(q, b, scale), (q, b, scale))


def late(n: int, device: str) -> Call:
    """Of queries against the documents of the batch, padded."""
    q, d = leaf(n, 9, D, device=device), leaf(n, 20, D, device=device)
    mask = torch.ones(n, 20, dtype=torch.bool, device=device)
    ones = torch.ones(n, n, device=device)
    return lambda: grad(mk.maxsim(q, d, d_mask=mask), (q, d), ones)


def words(n: int, device: str, vocab: int = 3200, **options: Any) -> Call:
    hidden, weight = leaf(n, D, device=device), leaf(vocab, D, device=device)
    targets = ids(n, device, vocab)
    return lambda: grad(mk.linear_cross_entropy(hidden, weight, targets, **options).sum(), (hidden, weight))


def distill(n: int, device: str, classes: int = 4096) -> Call:
    student, teacher = leaf(n, classes, device=device), leaf(n, classes, device=device).detach()
    center = torch.zeros(classes, device=device)
    return lambda: grad(mk.distillation_loss(student, teacher, 0.1, 0.04, center=center), student)


def attention(n: int, device: str, queries: int = 32, keys: int = 257, heads: int = 12) -> Call:
    """A Q-Former's over a batch of images."""
    q, k, v = (leaf(n, length, heads, 64, device=device) for length in (queries, keys, keys))
    ones = torch.ones_like(q)
    return lambda: grad(mk.attention(q, k, v, backend="mmkernels"), (q, k, v), ones)


def causal(n: int, device: str) -> Call:
    """Of one packed row that is as long as there are samples."""
    q, k, v = (leaf(1, 10 * n, 12, 64, device=device) for _ in range(3))
    ones = torch.ones_like(q)

    def call() -> tuple[Tensor, ...]:
        mask = mk.masks.causal(10 * n, 10 * n, device=device)
        return grad(mk.attention(q, k, v, mask=mask, dropout_p=0.1, backend="mmkernels"), (q, k, v), ones)

    return call


def lists(n: int, num: int) -> list[list[Tensor]]:
    return [[torch.rand(size) for size in (n, 5000, 3)] for _ in range(num)]


def ema(n: int, _: str) -> Call:
    targets, sources = lists(n, 2)
    return lambda: mk.ema_update_(targets, sources, 0.9)


def adamw(n: int, _: str) -> Call:
    params, grads, m, v, averages = lists(n, 5)
    return lambda: mk.adamw_update_(params, grads, m, v, lr=0.1, step=2, averages=averages)


def clip(n: int, _: str) -> Call:
    grads = lists(n, 1)[0]
    return lambda: mk.clip_(grads, 1.0)


OPS: dict[str, Callable[[int, str], Call]] = {
    "contrastive": contrastive, "contrastive of labels": labelled, "contrastive with a momentum teacher": momentum,
    "sigmoid": sigmoid, "token contrastive": tokens, "maxsim": late, "linear cross-entropy": words,
    "linear cross-entropy, every option": partial(words, label_smoothing=0.1, z_loss=1e-4, reduction="none"),
    "distillation": distill, "attention": attention, "causal attention": causal, "ema": ema, "adamw": adamw,
    "clip": clip,
}  # fmt: skip
# what has no table of addresses
WITHOUT_DATA = [name for name in OPS if name not in ("ema", "adamw", "clip")]


def recorded(gpu: FakeGpu, call: Call, **options: Any) -> Recorded:
    """Of a call that was made once before."""
    call()
    with gpu.record(**options) as found:
        call()
    return found


@kernels_alone
@pytest.mark.parametrize("name", OPS)
def test_kernels_run_on_the_device_of_the_tensors_and_its_current_stream(name: str, gpu: FakeGpu) -> None:
    gpu.streams = {0: 11, 1: 23}
    found = recorded(gpu, OPS[name](70, "cpu"), device=1, may_wait=True)
    assert found.launches and {(x.device, x.stream) for x in found.launches} == {(1, 23)} and gpu.current == 0


@kernels_alone
@pytest.mark.parametrize("name", OPS)
def test_nothing_waits_for_the_device(name: str, gpu: FakeGpu) -> None:
    recorded(gpu, OPS[name](70, "cpu"))


def test_linear_cross_entropy_asks_for_the_number_of_rows_behind_a_product(gpu: FakeGpu) -> None:
    """So that the GPU has work while the host waits."""
    rows = kernel.AHEAD
    assert not recorded(gpu, words(rows, "cpu", vocab=50), may_wait=True).waits
    found = recorded(gpu, words(rows + 1, "cpu", vocab=50), may_wait=True)
    assert len(found.waits) == 1 and "Event.synchronize" in found.waits[0]
    assert found.order.index("addmm") < found.order.index("wait") < len(found.order) - 20


# rows far beyond a training run's
EXTREME = {
    "maxsim of a corpus": lambda: late(1 << 14, "meta"),
    "attention of a million tokens": lambda: causal(100_000, "meta"),
    "attention of many heads": lambda: attention(70_000, "meta", queries=1, keys=64),
    "attention of one query": lambda: attention(3, "meta", queries=1, keys=1 << 24),
    "distillation of a vocabulary": lambda: distill(1 << 24, "meta", classes=1 << 17),
    "linear cross-entropy of a large vocabulary": lambda: words(1 << 17, "meta", vocab=262_144),
}


@kernels_alone
@pytest.mark.parametrize("name", [*WITHOUT_DATA, *EXTREME])
def test_no_grid_is_larger_than_cuda_launches(name: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "Awaited", lambda kept: lambda: 1 << 17)
    with without_data(gpu), gpu.record(may_wait=True) as found:
        call = EXTREME[name]() if name in EXTREME else OPS[name](1 << 17, "meta")
        call()
    assert found.launches
    for launched in found.launches:
        assert all(0 < x <= most for x, most in zip(launched.grid, MOST_PROGRAMS, strict=True)), launched


# by op, compiles of each of its kernels: where nothing is chosen by size three at most, of one row, of 16 n, of others
MOST_KEYS = {
    "contrastive": 3, "contrastive of labels": 3, "contrastive with a momentum teacher": 6, "sigmoid": 3,
    "token contrastive": 3, "maxsim": 1, "linear cross-entropy": 1, "linear cross-entropy, every option": 2,
    "distillation": 1, "attention": 2, "causal attention": 6, "ema": 1, "adamw": 1, "clip": 1,
}  # fmt: skip


@kernels_alone
@pytest.mark.parametrize("name", OPS)
def test_batches_of_changing_sizes_compile_few_kernels(name: str, gpu: FakeGpu) -> None:
    most, found = 30 if name == "attention" else 300, set()
    # one, those about multiples of 16, any
    sizes = [1, 2, 15, 16, 17, 32, 33, 48, 64, 128, 240, 256, *random.Random(0).sample(range(1, most), 25)]
    for size in sizes:
        with gpu.record(may_wait=True) as step:
            OPS[name](min(size, most), "cpu")()
        found |= step.keys
    counts = Counter(kernel for kernel, _ in found)
    assert 0 < max(counts.values()) <= MOST_KEYS[name], counts


# ATen calls and launches of forward and backward, views and allocations apart
MOST_CALLS = {
    "token contrastive": 76, "maxsim": 20,
    "linear cross-entropy": 27, "linear cross-entropy, every option": 44, "distillation": 28, "ema": 4, "adamw": 1,
    "clip": 5,
}  # fmt: skip


@kernels_alone
@pytest.mark.parametrize("name", MOST_CALLS)
def test_so_many_calls_at_most(name: str, gpu: FakeGpu) -> None:
    found = recorded(gpu, OPS[name](64, "cpu"), may_wait=True)
    assert found.num_kernels <= MOST_CALLS[name], found.aten - found.views


# with every call of ATen, autograd's, views and allocations too
MOST_OF_ALL = {"contrastive": 40, "sigmoid": 25}


@kernels_alone
@pytest.mark.parametrize("rows", [64, 1100])
@pytest.mark.parametrize("name", MOST_OF_ALL)
def test_a_loss_makes_so_many_calls_and_launches_at_most(name: str, rows: int, gpu: FakeGpu) -> None:
    found = recorded(gpu, OPS[name](rows, "cpu"))
    assert found.num_calls <= MOST_OF_ALL[name], found.aten


def padded(n: int) -> Call:
    q, k, v = (leaf(n, length, 12, 64) for length in (32, 257, 257))
    ones, mask = torch.ones_like(q), mk.masks.key_padding(torch.ones(n, 257, dtype=torch.bool), 32)
    return lambda: grad(mk.attention(q, k, v, mask=mask, backend="mmkernels"), (q, k, v), ones)


# of as many heads as keep a GPU busy: of fewer the keys are cut, and what becomes of the pieces is ATen's
@pytest.mark.parametrize("call", [attention(32, "cpu"), padded(32)], ids=["plain", "padded"])
def test_attention_makes_six_calls_more_than_it_has_kernels(call: Call, gpu: FakeGpu) -> None:
    found = recorded(gpu, call)
    assert found.launches and found.num_kernels <= len(found.launches) + 6, found.aten - found.views


@kernels_alone
def test_late_interaction_of_bfloat16_is_summed_in_float32(gpu: FakeGpu) -> None:
    q, d = leaf(6, 5, D), leaf(6, 7, D)
    loss = mk.token_contrastive_loss(q, d, 10.0)
    assert loss.dtype == torch.float32 and all(x.isfinite().all() for x in grad(loss, (q, d)))


def eager_contrastive(n: int) -> Call:
    a, b, scale = leaf(n, D), leaf(n, D), number(10.0, "cpu")

    def call() -> tuple[Tensor, ...]:
        logits, targets = scale * (a @ b.T), torch.arange(n)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        return grad(loss, (a, b, scale))

    return call


def eager_sigmoid(n: int) -> Call:
    """As open_clip writes it."""
    a, b, scale, bias = leaf(n, D), leaf(n, D), number(10.0, "cpu"), number(-10.0, "cpu")

    def call() -> tuple[Tensor, ...]:
        signs = 2 * torch.eye(n) - torch.ones(n)
        return grad(-F.logsigmoid(signs * (scale * (a @ b.T) + bias)).sum() / n, (a, b, scale, bias))

    return call


def eager_tokens(n: int) -> Call:
    q, b, scale = leaf(n, 32, D), leaf(n, D), number(10.0, "cpu")

    def call() -> tuple[Tensor, ...]:
        logits, targets = scale * (q @ b.T).amax(1), torch.arange(n)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        return grad(loss, (q, b, scale))

    return call


# by loss: as anybody writes it, and of the composition of it that is taken at few logits ATen calls, views too
COMPOSITIONS: dict[str, tuple[Callable[[int], Call], int]] = {
    "contrastive": (eager_contrastive, 44), "sigmoid": (eager_sigmoid, 36), "token contrastive": (eager_tokens, 62),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_of_few_logits_a_loss_takes_at_most_half_again_of_eagers_host_time(name: str, gpu: FakeGpu) -> None:
    eager, most_calls = COMPOSITIONS[name]
    rows = 8 if name == "token contrastive" else 32
    ours = OPS[name](rows, "cpu")
    found = recorded(gpu, ours)
    assert not found.launches and found.num_calls <= most_calls, found.aten
    times = host_times({"ours": ours, "eager": eager(rows)})
    assert times["ours"] <= 1.5 * times["eager"], times


# the largest batch of 64 wide features that is composed
BORDERS = {
    "contrastive": 1024, "contrastive of labels": 1024, "contrastive with a momentum teacher": 639, "sigmoid": 724,
    "token contrastive": 362,
}  # fmt: skip


@pytest.mark.parametrize("name", BORDERS)
def test_the_rule_takes_torchs_ops_up_to_its_border_and_the_kernels_beyond(name: str, gpu: FakeGpu) -> None:
    for rows, is_composed in ((1, True), (BORDERS[name], True), (BORDERS[name] + 1, False)):
        with without_data(gpu), gpu.record() as found:
            OPS[name](rows, "meta")()
        assert bool(found.launches) != is_composed, (rows, found.aten)


@pytest.mark.parametrize(("width", "is_composed"), [(768, True), (4096, False)])
def test_the_rule_counts_the_products_of_wide_features(
    width: int, is_composed: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "D", width)
    with without_data(gpu), gpu.record() as found:
        contrastive(1000, "meta")()
    assert bool(found.launches) != is_composed


COMPOSED_SPECS = [
    x for x in specs() if x.name.split("[")[0] in ("contrastive_loss", "sigmoid_loss", "token_contrastive_loss")
]


@pytest.mark.parametrize("spec", COMPOSED_SPECS, ids=lambda spec: spec.name)
def test_a_composition_obeys_the_contract(spec: OpSpec, gpu: FakeGpu) -> None:
    first = len(gpu.launches)
    for dtype in (*spec.dtypes, torch.float64):
        check(spec, spec.shapes[-1], spec.cases[-1], dtype)
    assert len(gpu.launches) == first


COMPOSED_LOSSES = ("contrastive", "sigmoid", "token_contrastive")


@pytest.mark.parametrize("name", COMPOSED_LOSSES)
def test_a_composition_has_the_derivatives_of_torch_func(name: str, gpu: FakeGpu) -> None:
    a, *others = LOSSES[name].inputs(9)
    found = torch.func.grad(LOSSES[name].fn)(a, *others)
    torch.testing.assert_close(found, grad(LOSSES[name].fn(a, *others), a)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["contrastive", "token_contrastive"])
def test_a_composition_marks_a_positive_that_is_no_column(name: str, reduction: str, gpu: FakeGpu) -> None:
    inputs = LOSSES[name].inputs(5)
    for wrong in (-1, 5):
        positives = torch.arange(5)
        positives[3] = wrong
        with gpu.record() as found:
            loss = LOSSES[name].fn(*inputs, positives=positives, reduction=reduction)
        expected = [False] * 3 + [True, False] if reduction == "none" else True
        assert loss.isnan().tolist() == expected and not found.launches


def test_a_composition_marks_a_wrong_claim_of_unit_norm(gpu: FakeGpu) -> None:
    a, b = (F.normalize(torch.randn(5, D), dim=1) for _ in range(2))
    with gpu.record() as found:
        right, wrong = (mk.contrastive_loss(x, b, 10.0, normalized=True) for x in (a, 2 * a))
    assert math.isfinite(right) and math.isnan(wrong) and not found.launches
