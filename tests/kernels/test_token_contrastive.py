"""What the token-contrastive ops promise beyond the contract that every op obeys."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmkernels import (
    contrastive_loss,
    token_contrastive_loss,
    token_contrastive_loss_ref,
    token_contrastive_stats,
)
from mmkernels._contract import check
from mmkernels._device import INTERPRETED
from mmkernels.token_contrastive import blockwise, late, op
from mmkernels.token_contrastive import loss as loss_module
from mmkernels.token_contrastive.launch import CHUNK_BYTES, MIN_CHUNK_TOKENS, chunk_rows
from mmkernels.token_contrastive.problem import Problem, weights_of
from mmkernels.token_contrastive.spec import LATE_STATS, LEAST_GAP, LOSS, SPECS, gaps
from tests.kernels.plants.plant import plant
from tests.kernels.plants.token_contrastive import LATE_BUGS

pytestmark = pytest.mark.usefixtures("streamed")


def features(
    num_rows: int, num_cols: int, num_tokens: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    tokens, b = torch.randn(num_rows, num_tokens, 12), torch.randn(num_cols, 12)
    return tokens.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def lavis(tokens: Tensor, b: Tensor, scale: float | Tensor, labels: Tensor | None, offset: int = 0) -> Tensor:
    """LAVIS's Blip2Qformer.forward, its contrastive part on one process, with the names of this file."""
    sim_i2t = torch.matmul(tokens.unsqueeze(1), b.unsqueeze(-1)).squeeze(-1).max(-1).values * scale
    sim_t2i = (
        torch.matmul(b.unsqueeze(1).unsqueeze(1), tokens.permute(0, 2, 1)).squeeze(-2).max(-1).values * scale
    )
    if labels is None:
        targets = torch.arange(len(tokens)) + offset
        of_rows = F.cross_entropy(sim_i2t, targets, label_smoothing=0.1)
        return (of_rows + F.cross_entropy(sim_t2i, targets, label_smoothing=0.1)) / 2
    targets = torch.eq(labels[:, None], labels).float()
    targets = targets / targets.sum(1, keepdim=True)
    targets = 0.9 * targets + 0.1 * torch.ones_like(targets) / targets.size(1)
    of_rows = -torch.sum(F.log_softmax(sim_i2t, dim=1) * targets, dim=1).mean()
    return (of_rows - torch.sum(F.log_softmax(sim_t2i, dim=1) * targets, dim=1).mean()) / 2


@pytest.mark.parametrize("by_image_id", [False, True])
def test_loss_and_gradients_are_those_of_lavis(by_image_id: bool) -> None:
    tokens, b = features(18, 18, 32)
    ids = torch.randint(9, (18,)) if by_image_id else None
    labels = None if ids is None else (ids, ids)
    loss = token_contrastive_loss(tokens, b, 1.3, labels=labels, label_smoothing=0.1)
    gold = lavis(tokens, b, 1.3, ids)
    torch.testing.assert_close(loss, gold)
    for got, expected in zip(torch.autograd.grad(loss, (tokens, b)), torch.autograd.grad(gold, (tokens, b))):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def filip(tokens: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
    """FILIP's equations 4 to 6 and 1 to 3, pair by pair."""
    size = len(tokens)
    of_images, of_texts = torch.zeros(size, size), torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            products = tokens[i] @ b[j][mask[j]].T
            of_images[i, j], of_texts[i, j] = products.amax(1).mean(), products.amax(0).mean()
    target = torch.arange(size)
    of_rows = F.cross_entropy(scale * of_images, target)
    return (of_rows + F.cross_entropy(scale * of_texts.T, target)) / 2


def test_late_interaction_is_filip() -> None:
    tokens, _ = features(7, 7)
    b = torch.randn(7, 4, 12, requires_grad=True)
    mask = torch.rand(7, 4) > 0.4
    mask[:, 0] = True
    loss, gold = token_contrastive_loss(tokens, b, 1.3, masks=(None, mask)), filip(tokens, b, mask, 1.3)
    torch.testing.assert_close(loss, gold)
    for got, expected in zip(torch.autograd.grad(loss, (tokens, b)), torch.autograd.grad(gold, (tokens, b))):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bug", LATE_BUGS)
def test_the_contract_of_late_interaction_turns_red_for(
    bug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(op, "late", plant(late, *LATE_BUGS[bug], tmp_path))
    with pytest.raises(AssertionError, match=r"bound|shape"):
        for case in LATE_STATS.cases:
            check(LATE_STATS, LATE_STATS.shapes[0], case, torch.float32, seeds=range(2))


def test_of_one_token_on_both_sides_it_is_the_contrastive_loss() -> None:
    tokens, b = features(17, 17, 1)
    loss = token_contrastive_loss(tokens, b[:, None], 2.0)
    torch.testing.assert_close(loss, contrastive_loss(tokens[:, 0], b, 2.0))


def test_of_one_token_it_is_the_contrastive_loss() -> None:
    tokens, b = features(17, 17, 1)
    torch.testing.assert_close(token_contrastive_loss(tokens, b, 2.0), contrastive_loss(tokens[:, 0], b, 2.0))


def test_the_data_of_the_contract_keep_the_best_token_ahead_of_rounding() -> None:
    """What the contract's bound relies on; see the spec."""
    for spec, dtype in itertools.product(SPECS, spec_dtypes()):
        for shape, case in itertools.product(spec.shapes, spec.cases):
            inputs = spec.make_inputs(shape, case, dtype, 0)
            sides = [(inputs["tokens"], inputs["b"])] + [(inputs["b"], inputs["tokens"])] * ("T" in shape)
            for side in sides:
                if case == "ties":
                    assert shape["D"] == 1 or shape["Q"] == 1 or (gaps(*side) == 0).any()
                    assert all((x == x.round()).all() for x in side)
                else:
                    assert gaps(*side).min() >= LEAST_GAP, (spec.name, case)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's path has no eager form")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "loss" in spec.name], ids=lambda spec: spec.name)
def test_the_eager_form_of_small_shapes_obeys_the_contract(spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "EAGER_PRODUCTS", 1 << 18)
    for case in spec.cases:
        for dtype in (*spec_dtypes(), torch.float64):
            check(spec, spec.shapes[-1], case, dtype)


def spec_dtypes() -> tuple[torch.dtype, ...]:
    return torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("num_tokens", [2, 16, 40, 300])
def test_of_equal_products_the_first_token_takes_the_gradient(num_tokens: int) -> None:
    tokens = torch.ones(3, num_tokens, 8)
    tokens[:, 0] = 0
    tokens.requires_grad_()
    b = torch.eye(8)[:3].requires_grad_()
    (grad,) = torch.autograd.grad(token_contrastive_stats(tokens, b, 1.0).row_lse.sum(), tokens)
    assert (grad[:, 1, :3] != 0).all()
    assert (grad[:, 2:] == 0).all() and (grad[:, 0] == 0).all()


def test_ranks_with_their_own_rows_add_up_to_the_whole_batch() -> None:
    """Data parallelism: each rank's rows against all columns, column sums combined by log-sum-exp."""
    tokens, b = features(24, 24)
    stats = [
        token_contrastive_stats(tokens[first : first + 8], b, 0.7, positives=torch.arange(first, first + 8))
        for first in (0, 8, 16)
    ]
    row_lse, positive = (torch.cat([getattr(x, name) for x in stats]) for name in ("row_lse", "positive"))
    col_lse = torch.stack([x.col_lse for x in stats]).logsumexp(0)
    loss = ((row_lse + col_lse) / 2 - positive).mean()
    whole = token_contrastive_loss_ref(tokens, b, 0.7)
    torch.testing.assert_close(loss, whole)
    for got, expected in zip(torch.autograd.grad(loss, (tokens, b)), torch.autograd.grad(whole, (tokens, b))):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_small_loss_is_not_rounded_to_the_ulps_of_large_logits() -> None:
    """Logits of 100 and 93, exact in float32: the loss, .014, must not be made of ulps of 100, 8e-6."""
    tokens, b = torch.eye(16)[:, None].repeat(1, 3, 1), 7 * torch.eye(16) + 93
    gold = math.log1p(15 * math.exp(-7))
    assert abs(token_contrastive_loss(tokens, b, 1.0).item() - gold) <= 4 * torch.finfo(torch.float32).eps


def test_a_row_whose_every_token_is_masked_has_zero_logits_and_no_gradient() -> None:
    tokens, b = features(6, 6)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[2] = False
    stats = token_contrastive_stats(tokens, b, 2.0, positives=torch.arange(6), masks=(mask, None))
    assert stats.positive[2] == 0
    assert stats.row_lse[2].item() == pytest.approx(math.log(6))
    grads = torch.autograd.grad(stats.row_lse.sum() + stats.col_lse.sum(), (tokens, b))
    assert (grads[0][2] == 0).all() and all(grad.isfinite().all() for grad in grads)


def test_a_masked_token_may_hold_anything_finite() -> None:
    tokens, b = features(6, 6)
    mask = torch.rand(6, 5) > 0.4
    mask[:, 0] = True
    losses = [
        token_contrastive_loss(tokens.where(mask[..., None], fill), b, 2.0, masks=(mask, None))
        for fill in (0.0, 1e4)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_rows_and_columns_without_a_partner_add_nothing_and_are_not_counted(reduction: str) -> None:
    tokens, b = features(5, 5)
    labels = (torch.tensor([0, 1, 2, 7, 8]), torch.tensor([0, 1, 2, 3, 9]))
    loss = token_contrastive_loss(tokens, b, 1.0, labels=labels, reduction=reduction)
    stats = token_contrastive_stats(tokens, b, 1.0, positives=torch.arange(5))
    pairs = ((stats.row_lse + stats.col_lse) / 2 - stats.positive)[:3]
    gold = {"none": F.pad(pairs, (0, 2)), "mean": pairs.mean(), "sum": pairs.sum()}[reduction]
    torch.testing.assert_close(loss, gold)


def test_labels_without_any_pair_have_loss_zero_and_zero_gradients() -> None:
    tokens, b = features(3, 4)
    loss = token_contrastive_loss(tokens, b, 1.0, labels=(torch.arange(3), torch.arange(4) + 3))
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (tokens, b)))


def test_a_row_without_a_positive_has_zero_in_its_place() -> None:
    tokens, b = features(3, 4)
    stats = token_contrastive_stats(tokens, b, 1.0, positives=torch.tensor([2, -1, 0]))
    assert stats.positive[1] == 0 and (stats.positive[[0, 2]] != 0).all()


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_zero_and_negative_scales_multiply_the_maximum(scale: float) -> None:
    tokens, b = features(9, 9, dtype=torch.float64)
    of_scale = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
    wrt = (tokens, b, of_scale)
    got = torch.autograd.grad(token_contrastive_loss(tokens, b, of_scale), wrt)
    gold = torch.autograd.grad(token_contrastive_loss_ref(tokens, b, of_scale), wrt)
    for x, y in zip(got, gold):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_an_empty_batch_has_loss_zero_and_zero_gradients() -> None:
    tokens, b = features(0, 0)
    scale = torch.tensor(3.0, requires_grad=True)
    loss = token_contrastive_loss(tokens, b, scale, label_smoothing=0.1)
    grads = torch.autograd.grad(loss, (tokens, b, scale))
    assert loss.item() == 0 and grads[2].item() == 0
    assert [grad.shape for grad in grads] == [tokens.shape, b.shape, ()]


def test_no_rows_against_some_columns_give_minus_infinity() -> None:
    tokens, b = features(0, 3)
    stats = token_contrastive_stats(
        tokens, b, 3.0, labels=(torch.arange(0), torch.arange(3)), with_totals=True
    )
    assert (
        (stats.col_lse == -math.inf).all() and (stats.col_total == 0).all() and (stats.col_matched == 0).all()
    )
    assert stats.row_lse.shape == stats.row_total.shape == stats.row_matched.shape == (0,)


def test_not_a_number_in_a_token_reaches_the_loss() -> None:
    tokens, b = features(9, 9)
    with torch.no_grad():
        tokens[3, 2, 1] = math.nan
    assert token_contrastive_loss(tokens, b, 2.0).isnan()


class ProductCounter(TorchDispatchMode):
    """Counts matrix products and sums of features."""

    products = sums = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket.__name__ in ("mm", "_linear_pointwise")
        self.sums += func.overloadpacket.__name__.startswith("_embedding_bag")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needs", "sums"), [((True, True, True), 2), ((False, True, False), 1), ((False, False, True), 0)]
)
def test_backward_multiplies_matrices_once_and_sums_features_only_where_asked(
    needs: tuple[bool, bool, bool], sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "TILE", 1 << 20)
    tokens, b = (x.detach() for x in features(9, 9))
    problem = Problem(tokens, b, torch.tensor(1.0), None, None, None, None, None, False)
    stats = blockwise.token_contrastive_fwd(problem)
    grads = [torch.ones_like(x) for x in stats[:8]]
    assert len(weights_of(stats, grads)) == 8
    with ProductCounter() as counter:
        results = blockwise.token_contrastive_bwd(problem, stats, grads, needs)
    assert (counter.products, counter.sums) == (1, sums)
    assert tuple(result is not None for result in results) == needs


def test_the_registered_ops_pass_opcheck() -> None:
    tokens, b = features(3, 4)
    scale = torch.tensor([2.0], requires_grad=True)
    mask = torch.rand(3, 5) > 0.3
    for options in (
        (None,) * 5 + (False,),
        (torch.arange(3), torch.arange(3), torch.arange(4), mask, None, True),
    ):
        fwd = torch.ops.mmkernels.token_contrastive_fwd.default
        torch.library.opcheck(fwd, (tokens, b, scale, *options))
        stats = [x.detach() for x in fwd(tokens, b, scale, *options)]
        grads = [torch.ones_like(x) for x in stats[:8]]
        for needs in ([True, True, True], [False, True, False]):
            args = (tokens.detach(), b.detach(), scale.detach(), *options, stats, grads, needs)
            torch.library.opcheck(torch.ops.mmkernels.token_contrastive_bwd.default, args)


def test_activation_checkpointing_changes_no_bit() -> None:
    tokens, b = features(9, 9)
    plain = torch.autograd.grad(token_contrastive_loss(tokens, b, 2.0), (tokens, b))
    loss = checkpoint(token_contrastive_loss, tokens, b, 2.0, use_reentrant=False)
    assert isinstance(loss, Tensor)
    assert all(torch.equal(x, y) for x, y in zip(plain, torch.autograd.grad(loss, (tokens, b))))


def test_a_second_batch_size_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(token_contrastive_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (9, 11, 14):
        tokens, b = features(size, size)
        assert torch.equal(compiled(tokens, b, 2.0), token_contrastive_loss(tokens, b, 2.0))


@pytest.mark.skipif(INTERPRETED, reason="of the blockwise path; thousands of the interpreter's tiles")
def test_real_tiles_with_ragged_edges_obey_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "TILE", 1 << 16)
    monkeypatch.setattr(blockwise, "TILE_COLS", 256)
    check(LOSS, {"M": 257, "Q": 32, "N": 257, "D": 8}, "trained", torch.float32, seeds=range(2))


def test_chunks_of_the_gradient_stay_within_their_bounds() -> None:
    assert chunk_rows(32, 4096, 2) * 32 * 4096 * 2 == CHUNK_BYTES
    assert chunk_rows(32, 1 << 20, 4) * 32 == MIN_CHUNK_TOKENS
    assert chunk_rows(5000, 1 << 20, 4) == 1


@pytest.mark.gpu
def test_the_compiled_kernel_is_exact_at_real_shapes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(LOSS, {"M": 257, "Q": 32, "N": 257, "D": 256}, "trained", dtype, "cuda", seeds=range(2))


@pytest.mark.gpu
def test_the_compiled_kernel_replays_in_a_cuda_graph() -> None:
    tokens, b = (F.normalize(x.detach().cuda(), dim=-1) for x in features(70, 70, 32))
    scale = torch.tensor(20.0, device="cuda")
    expected = token_contrastive_loss(tokens, b, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = token_contrastive_loss(tokens, b, scale)
    graph.replay()
    assert torch.equal(loss, expected)


@pytest.mark.gpu
def test_the_gpu_path_never_waits_for_the_device() -> None:
    tokens, b = (x.detach().cuda().requires_grad_() for x in features(70, 70, 32))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    ids = torch.arange(70, device="cuda") // 2
    options = {"labels": (ids, ids), "label_smoothing": 0.1}
    token_contrastive_loss(tokens, b, scale, **options).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_contrastive_loss(tokens, b, scale, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
