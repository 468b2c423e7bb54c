"""What MaxSim promises beyond the contract that every op obeys."""

import math

import pytest
import torch
from torch import Tensor

from mmkernels import maxsim, maxsim_ref

pytestmark = pytest.mark.usefixtures("either_form")


def tokens(batch: int = 3, length: int = 5, docs: int = 4, doc_length: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, d = (torch.randn(n, size, 24, generator=generator) for n, size in ((batch, length), (docs, doc_length)))
    return q.requires_grad_(), d.requires_grad_()


def test_it_is_the_sum_of_the_best_products() -> None:
    q, d = (x.detach().double() for x in tokens())
    expected = [[sum(max(float(x @ y) for y in doc) for x in query) for doc in d] for query in q]
    torch.testing.assert_close(maxsim(q, d), torch.tensor(expected, dtype=torch.float64))


def test_padding_changes_nothing() -> None:
    q, d = tokens()
    score = maxsim(q, d)
    expected = score.detach(), *torch.autograd.grad(score.sin().sum(), (q, d))
    padded = [torch.cat([x, x.new_full((len(x), 7, 24), math.nan)], 1).detach().requires_grad_() for x in (q, d)]
    masks = [torch.arange(x.shape[1]).expand(x.shape[:2]) < x.shape[1] - 7 for x in padded]
    score = maxsim(*padded, q_mask=masks[0], d_mask=masks[1])
    grads = torch.autograd.grad(score.sin().sum(), padded)
    torch.testing.assert_close(score, expected[0], rtol=1e-5, atol=1e-4)
    for got, want in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(got[:, :-7], want, rtol=1e-4, atol=1e-4)
        assert (got[:, -7:] == 0).all()


def test_documents_and_queries_of_no_token_score_zero_without_a_gradient() -> None:
    q, d = tokens()
    q_mask, d_mask = torch.ones(3, 5, dtype=torch.bool), torch.ones(4, 40, dtype=torch.bool)
    q_mask[1], d_mask[2] = False, False
    score = maxsim(q, d, q_mask=q_mask, d_mask=d_mask)
    assert (score[1] == 0).all() and (score[:, 2] == 0).all() and (score[[0, 2]][:, [0, 1, 3]] != 0).all()
    dq, dd = torch.autograd.grad(score.sum(), (q, d))
    assert (dq[1] == 0).all() and (dd[2] == 0).all() and (dq[0] != 0).any() and (dd[0] != 0).any()


@pytest.mark.parametrize(("batch", "docs"), [(0, 4), (3, 0), (0, 0)])
def test_no_queries_or_no_documents_are_no_scores(batch: int, docs: int) -> None:
    q, d = tokens(batch, docs=docs)
    score = maxsim(q, d)
    assert score.shape == (batch, docs)
    for dx, x in zip(torch.autograd.grad(score.sum(), (q, d)), (q, d), strict=True):
        assert dx.shape == x.shape and (dx == 0).all()


def test_a_query_that_is_not_a_number_is_seen() -> None:
    q, d = (x.detach() for x in tokens())
    q[1, 2, 0] = math.nan
    assert not maxsim(q, d)[1].isfinite().any() and maxsim(q, d)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("frozen", ["q", "d"])
def test_of_a_frozen_side_no_gradient_is_made(frozen: str) -> None:
    q, d = tokens()
    whole = dict(zip("qd", torch.autograd.grad(maxsim(q, d).sum(), (q, d)), strict=True))
    inputs = {"q": q, "d": d}
    inputs[frozen].requires_grad_(False)
    other = "d" if frozen == "q" else "q"
    assert torch.equal(torch.autograd.grad(maxsim(q, d).sum(), inputs[other])[0], whole[other])


def test_documents_longer_than_16_bits_count() -> None:
    q, d = torch.zeros(1, 1, 2), torch.zeros(1, 40_000, 2)
    q[0, 0, 0] = d[0, 39_999, 0] = 1
    d.requires_grad_()
    score = maxsim(q, d)
    assert score.item() == 1 == maxsim_ref(q, d).item()
    assert torch.autograd.grad(score, d)[0].nonzero().tolist() == [[0, 39_999, 0]]
