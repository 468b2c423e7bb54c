"""What the token-contrastive ops promise beyond the contract that every op obeys."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.token_contrastive import LEAST_GAP, SPECS, gaps
from mmkernels import contrastive_loss, token_contrastive_loss, token_contrastive_stats
from mmkernels.token_contrastive import blockwise
from mmkernels.token_contrastive.kernel import CHUNK_BYTES, MIN_CHUNK_TOKENS, chunk_rows
from mmkernels.token_contrastive.problem import Problem, weights_of
from tests.kernels.recorded import Operations

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
    sim_t2i = torch.matmul(b.unsqueeze(1).unsqueeze(1), tokens.permute(0, 2, 1)).squeeze(-2).max(-1).values * scale
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


def test_of_one_token_it_is_the_contrastive_loss() -> None:
    tokens, b = features(17, 17, 1)
    for columns in (b, b[:, None]):
        loss = token_contrastive_loss(tokens, columns, 2.0)
        torch.testing.assert_close(loss, contrastive_loss(tokens[:, 0], b, 2.0))


def test_the_data_of_the_contract_keep_the_best_token_ahead_of_rounding() -> None:
    """What the contract's bound relies on; see the spec."""
    for spec, dtype in itertools.product(SPECS, (torch.float32, torch.float16, torch.bfloat16)):
        for shape, case in itertools.product(spec.shapes, spec.cases):
            inputs = spec.make_inputs(shape, case, dtype, 0)
            sides = [(inputs["tokens"], inputs["b"])] + [(inputs["b"], inputs["tokens"])] * ("T" in shape)
            for side in sides:
                if case == "ties":
                    assert shape["D"] == 1 or shape["Q"] == 1 or (gaps(*side) == 0).any()
                    assert all((x == x.round()).all() for x in side)
                else:
                    assert gaps(*side).min() >= LEAST_GAP, (spec.name, case)


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
        token_contrastive_loss(tokens.where(mask[..., None], fill), b, 2.0, masks=(mask, None)) for fill in (0.0, 1e4)
    ]
    assert torch.equal(*losses)


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
    with Operations() as seen:
        results = blockwise.token_contrastive_bwd(problem, stats, grads, needs)
    assert (seen.products, sum(count for name, count in seen.names.items() if name.startswith("_embedding_bag"))) == (
        1,
        sums,
    )
    assert tuple(result is not None for result in results) == needs


def test_chunks_of_the_gradient_stay_within_their_bounds() -> None:
    assert chunk_rows(32, 4096, 2) * 32 * 4096 * 2 == CHUNK_BYTES
    assert chunk_rows(32, 1 << 20, 4) * 32 == MIN_CHUNK_TOKENS
    assert chunk_rows(5000, 1 << 20, 4) == 1
