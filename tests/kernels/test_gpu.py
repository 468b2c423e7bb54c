"""The kernels as a GPU runs them: at real shapes, in CUDA graphs, and without waiting for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels as mk
from bench.contract import check
from bench.ops.contrastive import LOSS as CONTRASTIVE
from bench.ops.distill import SPECS as DISTILL
from bench.ops.linear_cross_entropy import PLAIN, ROWS
from bench.ops.maxsim import MASKED as MAXSIM
from bench.ops.sigmoid import LABELS, LOSS
from bench.ops.token_contrastive import LOSS as TOKENS
from bench.spec import OpSpec, Shape
from mmkernels import masks
from tests.kernels.losses import LOSSES, on_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_alone")]

WORDS, SQUARE = {"T": 2500, "D": 512, "V": 32001}, {"B": 1031, "D": 512}
REAL: list[tuple[OpSpec, Shape, str]] = [
    (CONTRASTIVE, SQUARE, "trained"), (LOSS, SQUARE, "trained"), (LABELS, {"M": 520, "N": 1031, "D": 512}, "trained"),
    (MAXSIM, {"B": 9, "Lq": 33, "N": 17, "Ld": 257, "D": 128}, "trained"),
    (MAXSIM, {"B": 5, "Lq": 40, "N": 9, "Ld": 70, "D": 320}, "random"),
    (TOKENS, {"M": 257, "Q": 32, "N": 257, "D": 256}, "trained"), (PLAIN, WORDS, "random"), (ROWS, WORDS, "random"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "shape", "case"), REAL, ids=lambda x: getattr(x, "name", ""))
def test_a_compiled_kernel_is_exact_at_real_shapes(spec: OpSpec, shape: Shape, case: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(spec, shape, case, dtype, "cuda", seeds=range(2))


@pytest.mark.parametrize("case", DISTILL[0].cases)
def test_a_compiled_kernel_is_exact_over_many_classes(case: str) -> None:
    check(DISTILL[0], {"B": 7, "C": 32003}, case, torch.bfloat16, "cuda", seeds=range(2))


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call that was made once before on a stream of its own, and its result there."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@contextmanager
def waits(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((130, 4), (257, 2), (257, 2))
    return [torch.randn(2, n, h, 64, device="cuda", dtype=dtype, requires_grad=True) for n, h in sizes]


def attend(mask: masks.Mask, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Tensor]:
    inputs = qkv(dtype)
    return lambda: mk.attention(*inputs, mask=mask, backend="mmkernels", **options)


def attend_padded() -> Callable[[], Tensor]:
    """The mask is made in each call."""
    inputs, keys = qkv(torch.half), (torch.arange(257, device="cuda") % 5 > 0).expand(2, -1)

    def call() -> Tensor:
        mask = masks.causal(130, 257, device="cuda") & masks.key_padding(keys, 130)
        return mk.attention(*inputs, mask=mask, empty_rows="uniform", backend="mmkernels")

    return call


def of_loss(name: str, rows: int, **options: Any) -> Callable[[], Tensor]:
    inputs = on_cuda(name, rows)
    return lambda: LOSSES[name].fn(*inputs, **options).sum()


def ids(num: int, kinds: int) -> tuple[Tensor, Tensor]:
    found = torch.arange(num, device="cuda") % kinds
    return found, found


FORWARDS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "attention": lambda: attend(masks.lengths(torch.tensor([0, 200], device="cuda"), 130, 257), torch.half),
    "contrastive": lambda: of_loss("contrastive", 300),
    "token_contrastive": lambda: of_loss("token_contrastive", 70),
    "distillation": lambda: of_loss("distillation", 64),
}
STEPS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "contrastive": FORWARDS["contrastive"],
    "attention": lambda: attend(masks.causal(130, 257, device="cuda"), dropout_p=0.1),
    "attention of padded keys": attend_padded,
    "token_contrastive": lambda: of_loss("token_contrastive", 70, labels=ids(70, 35), label_smoothing=0.1),
    "sigmoid": lambda: of_loss("sigmoid", 300),
    "sigmoid with labels": lambda: of_loss("sigmoid", 300, labels=ids(300, 70), reduction="none"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_cuda_graph_replays_a_forward(name: str) -> None:
    with torch.no_grad():
        call = FORWARDS[name]()
        expected = call()
        graph, out = captured(call)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", STEPS)
def test_forward_and_backward_never_wait_for_the_device(name: str) -> None:
    call = STEPS[name]()
    call().sum().backward()
    with waits("error"):
        call().sum().backward()


def test_a_cuda_graph_replays_the_sigmoid_loss_and_its_gradients() -> None:
    inputs, labels = on_cuda("sigmoid", 300), ids(300, 70)

    def call() -> list[Tensor]:
        of_labels = mk.sigmoid_loss(*inputs, labels=labels, reduction="none")
        loss = mk.sigmoid_loss(*inputs) + of_labels.sum()
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    expected = call()
    graph, got = captured(call)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_a_cuda_graph_replays_linear_cross_entropy_for_other_targets() -> None:
    hidden, weight, targets = on_cuda("linear_cross_entropy", 300)
    static = targets.clone()

    def call() -> tuple[Tensor, Tensor]:
        loss = mk.linear_cross_entropy(hidden, weight.detach(), static)
        return loss, torch.autograd.grad(loss, hidden)[0]

    graph, found = captured(call)
    static.copy_(targets.roll(1))
    graph.replay()
    torch.testing.assert_close(found, call())


@pytest.mark.parametrize("num_rows", [300, 2000])
def test_linear_cross_entropy_never_waits_and_marks_a_target_outside_the_vocabulary(num_rows: int) -> None:
    """Of many rows the host asks for the number that counts, behind a product."""
    hidden, weight, targets = on_cuda("linear_cross_entropy", num_rows)
    targets[::3] = -100
    mk.linear_cross_entropy(hidden, weight, targets).backward()
    with waits("error"):
        mk.linear_cross_entropy(hidden, weight, targets).backward()
    targets[4] = len(weight)
    rows = mk.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert rows[4].isnan() and rows.isnan().sum() == 1


def test_dropout_has_the_bits_of_the_cpu() -> None:
    q, k, v = (x.detach()[:, :20] for x in qkv())
    found = mk.attention(q, k, v, dropout_p=0.4, seed=11, backend="mmkernels")
    wide = (x.cpu().double() for x in (q, k, v))
    gold: Any = mk.attention_ref(*wide, dropout_p=0.4, seed=torch.tensor(11))
    torch.testing.assert_close(found.cpu(), gold.float())


def filled(value: float) -> list[Tensor]:
    return [torch.full((5000,), value, device="cuda")]


def test_a_cuda_graph_reads_the_settings_of_updates_anew() -> None:
    targets, sources, decay = filled(0.0), filled(1.0), torch.tensor(0.5, device="cuda")
    graph, _ = captured(lambda: mk.ema_update_(targets, sources, decay))
    targets[0].zero_()
    decay.fill_(0.25)
    graph.replay()
    assert torch.equal(targets[0], torch.full_like(targets[0], 0.75))
    p, g, m, v = filled(0.0), filled(1.0), filled(0.0), filled(0.0)
    lr, step = torch.tensor(0.5, device="cuda"), torch.tensor(1.0, device="cuda")
    graph, _ = captured(lambda: mk.adamw_update_(p, g, m, v, lr=lr, step=step, eps=0.0))
    for x in (p, m, v):
        x[0].zero_()
    lr.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(p[0], torch.full_like(p[0], -0.25))


def test_a_cuda_graph_takes_a_clip_and_its_norm() -> None:
    x = [torch.ones(n, device="cuda") for n in (5000, 7)]
    graph, norm = captured(lambda: mk.clip_(x, 1.0))
    for tensor in x:
        tensor.fill_(2.0)
    graph.replay()
    torch.testing.assert_close(norm, torch.tensor(2 * 5007**0.5, device="cuda"))
    torch.testing.assert_close(x[0], torch.full_like(x[0], 5007**-0.5))
