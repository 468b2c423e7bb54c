"""What the token-contrastive ops promise beyond the contract that every op obeys."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import contrastive_loss, token_contrastive_loss, token_contrastive_stats

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
