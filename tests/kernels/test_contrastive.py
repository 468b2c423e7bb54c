"""What the contrastive ops promise beyond the contract that every op obeys."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contract import check
from bench.ops.contrastive import VARIANTS
from bench.ops.statistics import STATS
from bench.spec import OpSpec
from mmkernels import contrastive_loss, contrastive_loss_ref, contrastive_stats, contrastive_stats_ref
from mmkernels._device import INTERPRETED, runs_triton
from mmkernels.contrastive import blockwise, eager, kernel, op
from mmkernels.contrastive.problem import Problem
from tests.kernels.recorded import opcheck

LOSSES = (contrastive_loss, contrastive_loss_ref)


def features(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, 24).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps no logits")
@pytest.mark.parametrize("spec", [STATS, *VARIANTS], ids=lambda spec: spec.name)
def test_statistics_whose_logits_are_kept_obey_the_contract(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "TILE", 32)
    monkeypatch.setattr(eager, "EAGER_LOGITS", 0)
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

    def call() -> Tensor:
        pair = (teacher[0], teacher[1]) if has_teacher else None
        stats = contrastive_stats(a, b, 2.0, positives=torch.arange(40), teacher=pair)
        return torch.stack([x.sum() for x in stats[:5]]).sum()

    total = call()
    first = torch.autograd.grad(total, (a, b), retain_graph=True)
    # the teacher's in both passes
    assert len(computed) == (3 if has_teacher else 1)
    second = torch.autograd.grad(total, (a, b))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    opcheck(lambda: torch.autograd.grad(call(), (a, b)))


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


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator), dim=-1)


def agree(loss: Tensor, gold: Tensor, *leaves: Tensor) -> None:
    """Values and gradients, in float64."""
    torch.testing.assert_close(loss, gold, rtol=1e-9, atol=1e-11)
    for dx, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(gold, leaves)):
        assert expected.abs().max() > 1e-6, "the check needs a gradient that is not zero"
        torch.testing.assert_close(dx, expected, rtol=1e-8, atol=1e-11)


def leaves(rows: int, cols: int, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    a, b = unit(rows, width).double(), unit(cols, width, seed=1).double()
    return a.requires_grad_(), b.requires_grad_(), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)


def test_moco_is_a_queue_in_one_direction() -> None:
    """arXiv:1911.05722, algorithm 1: the positive logit beside those of the queue."""
    q, k, scale = leaves(40, 40)
    queue = unit(70, 24, seed=2).double()
    logits = scale * torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)
    gold = F.cross_entropy(logits, torch.zeros(40, dtype=torch.int64))
    rows = [contrastive_loss(q[i : i + 1], k[i : i + 1], scale, symmetric=False, negatives=queue) for i in range(40)]
    agree(torch.stack(rows).mean(), gold, q, k, scale)


def test_albef_distils_from_its_momentum_features_and_their_queue() -> None:
    """arXiv:2107.07651, equation 6, one direction: soft targets over the momentum batch and the queue."""
    image, text_m, scale = leaves(40, 40)
    image_m, queue, alpha = unit(40, 24, seed=3).double(), unit(70, 24, seed=2).double(), 0.4
    everything = torch.cat([text_m, queue])
    with torch.no_grad():
        target = F.one_hot(torch.arange(40), 110).double()
        target = alpha * (scale * image_m @ everything.T).softmax(1) + (1 - alpha) * target
    gold = -((scale * image @ everything.T).log_softmax(1) * target).sum(1).mean()
    loss = contrastive_loss(
        image, text_m, scale, symmetric=False, negatives=queue, teacher=(image_m, text_m.detach()), alpha=alpha
    )
    agree(loss, gold, image, text_m, scale)


def test_unicl_shares_the_target_among_equal_labels_in_both_directions() -> None:
    """arXiv:2204.03610, equation 3."""
    image, text, scale = leaves(40, 40)
    labels = torch.arange(40) % 11
    logits, same = scale * image @ text.T, (labels[:, None] == labels).double()
    gold = 0.0
    for x in (logits, logits.T):
        gold = gold - (x.log_softmax(1) * same / same.sum(1, keepdim=True)).sum(1).mean() / 2
    agree(contrastive_loss(image, text, scale, labels=(labels, labels)), gold, image, text, scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_positives_pick_a_column_for_each_row(symmetric: bool, smoothing: float) -> None:
    a, b, scale = leaves(40, 66)
    positives = torch.randperm(66, generator=torch.Generator().manual_seed(0))[:40]
    logits = scale * a @ b.T
    gold = F.cross_entropy(logits, positives, label_smoothing=smoothing, reduction="none")
    if symmetric:
        cols = F.cross_entropy(logits.T[positives], torch.arange(40), label_smoothing=smoothing, reduction="none")
        gold = (gold + cols) / 2
    loss = contrastive_loss(
        a, b, scale, positives=positives, symmetric=symmetric, label_smoothing=smoothing, reduction="none"
    )
    assert loss.shape == (40,)
    upstream = torch.linspace(0, 1, 40, dtype=torch.float64)
    agree((upstream * loss).sum(), (upstream * gold).sum(), a, b, scale)


@pytest.fixture(params=["eager", "kept", "streamed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in which a CPU may compute a small batch."""
    if request.param != "eager":
        monkeypatch.setattr(eager, "EAGER_LOGITS", 0)
    if request.param == "streamed":
        monkeypatch.setattr(op, "STORED_LOGITS", 0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_column_that_no_row_sees_is_as_if_it_were_not_there(symmetric: bool, has_teacher: bool) -> None:
    a, b, scale = leaves(7, 9)
    seen = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    exclude, ta, tb = torch.full((7,), 4), unit(7, 24, seed=3).double(), unit(9, 24, seed=4).double()
    taught, fewer = ({"teacher": (ta, x), "alpha": 0.4} if has_teacher else {} for x in (tb, tb[seen]))
    options = {"positives": seen[:7], "exclude": exclude, "symmetric": symmetric}
    gold = contrastive_loss_ref(a, b[seen], scale, symmetric=symmetric, positives=torch.arange(7), **fewer)
    agree(contrastive_loss(a, b, scale, **options, **taught), gold, a, b, scale)
    (db,) = torch.autograd.grad(contrastive_loss(a, b, scale, **options, **taught), b)
    assert (db[4] == 0).all() and db[seen].all()


@pytest.mark.usefixtures("form")
def test_what_sees_nothing_has_a_sum_of_nothing_and_no_gradient() -> None:
    """Column 4, and then a row of one column: -inf, and no expectation; whatever gradient comes in."""
    a, b, scale = leaves(7, 9)
    seen = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    teacher = unit(7, 24, seed=3).double(), unit(9, 24, seed=4).double()
    found = contrastive_stats(a, b, scale, positives=seen[:7], exclude=torch.full((7,), 4), teacher=teacher)[:5]
    fewer = teacher[0], teacher[1][seen]
    gold = contrastive_stats_ref(a, b[seen], scale, positives=torch.arange(7), teacher=fewer)
    assert found[1][4] == -torch.inf and found[4][4].isnan()
    found = [found[0], found[1][seen], found[2], found[3], found[4][seen]]
    totals = (torch.stack([x.sum() for x in side]).sum() for side in (found, gold))
    agree(*totals, a, b, scale)
    for at_a, at_b, exclude in ((a, b, torch.full((7,), 4)), (a[:2], b[:1], torch.tensor([-1, 0]))):
        stats = contrastive_stats(at_a, at_b, scale, exclude=exclude)[:2]
        da, db, dscale = torch.autograd.grad(stats, (a, b, scale), [torch.ones_like(x) for x in stats])
        assert all(x.isfinite().all() for x in (da, db, dscale))
        if len(at_b) == 1:
            assert stats[0].isinf().tolist() == [False, True] and (da[1] == 0).all() and da[0].all()
        else:
            assert (db[4] == 0).all() and db[seen].all()


@pytest.mark.usefixtures("form")
def test_a_column_that_is_not_there_is_no_exclusion() -> None:
    a, b, scale = leaves(7, 7)
    exclude = torch.tensor([-1, 7, 2**40, -(2**40), -1, 7, -2])
    agree(contrastive_loss(a, b, scale, exclude=exclude), contrastive_loss_ref(a, b, scale), a, b, scale)


def test_constants_get_no_gradient() -> None:
    a, b, queue, ta, tb = (unit(40, 24, seed=i).requires_grad_() for i in range(5))
    contrastive_loss(a, b, 9.0, negatives=queue, teacher=(ta, tb), alpha=0.5).backward()
    assert a.grad is not None
    assert queue.grad is ta.grad is tb.grad is None


def test_a_queue_that_is_still_empty_changes_nothing() -> None:
    a, b = unit(40, 24), unit(40, 24, seed=1)
    kwargs = {"symmetric": False, "teacher": (b, a), "alpha": 0.4}
    loss = contrastive_loss(a, b, 9.0, negatives=a[:0], **kwargs)
    torch.testing.assert_close(loss, contrastive_loss(a, b, 9.0, **kwargs))


class TestNormalized:
    a, b = unit(40, 48), unit(40, 48, seed=1)

    @pytest.mark.parametrize("broken", [0, 1])
    def test_a_wrong_claim_is_seen(self, broken: int) -> None:
        a, b = (x * torch.linspace(1, 1.02, 40)[:, None] if i == broken else x for i, x in enumerate((self.a, self.b)))
        message = f"{'ab'[broken]} must have rows of unit norm, as normalized=True claims, got .* norm 1.02"
        with pytest.raises(ValueError, match=message):
            contrastive_loss(a, b, 100.0, normalized=True)

    def test_a_scale_beyond_what_the_shift_carries_is_refused(self) -> None:
        with pytest.raises(ValueError, match="logit_scale must be at most 128 with normalized=True, got 150"):
            contrastive_loss(self.a, self.b, 150.0, normalized=True)


@pytest.mark.parametrize("scale", [60.0, 100.0, 127.0, 4000.0, -100.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_at_odds_with_all_others_lose_no_sum(scale: float, dtype: torch.dtype) -> None:
    """No shift of all logits serves a batch in which some rows meet their opposites alone."""
    a, b = unit(40, 48).to(dtype), unit(1, 48, seed=1).to(dtype).expand(40, -1)
    a = torch.where(torch.arange(40)[:, None] % 2 == 0, a, -b).requires_grad_()
    stats = contrastive_stats(a, b, scale, positives=torch.arange(40))
    gold = contrastive_stats_ref(a.double(), b.double(), scale, positives=torch.arange(40))
    for got, expected in zip(stats[:3], gold[:3], strict=True):
        # some roundings of a logit
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=3e-5)
    loss, expected = (f(x, y, scale) for f, x, y in zip(LOSSES, (a, a.double()), (b, b.double()), strict=True))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    grads = [torch.autograd.grad(x, a)[0].double() for x in (loss, expected)]
    # a logit is rounded at the scale
    bound = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * max(abs(scale), 1)
    assert (grads[0] - grads[1]).abs().max() <= bound * grads[1].abs().max()
