"""contrastive_loss argument by argument: the papers' formulas, the labels' edges, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import contrastive_loss, contrastive_lse, contrastive_stats
from mmkernels._device import INTERPRETED
from mmkernels.contrastive.labels import first_match, label_sums
from mmkernels.contrastive.op import gives_nan
from mmkernels.contrastive.spec import LOSS


# the interpreter runs the kernels alone
@pytest.fixture(params=["streamed"] if INTERPRETED else ["streamed", "eager_form"], autouse=True)
def either_form(request: pytest.FixtureRequest) -> None:
    if request.param == "streamed":
        request.getfixturevalue("streamed")


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
    rows = [
        contrastive_loss(q[i : i + 1], k[i : i + 1], scale, symmetric=False, negatives=queue)
        for i in range(40)
    ]
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
        image,
        text_m,
        scale,
        symmetric=False,
        negatives=queue,
        teacher=(image_m, text_m.detach()),
        alpha=alpha,
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


def test_several_captions_an_image_are_all_its_positives() -> None:
    image, text, scale = leaves(14, 70)
    owner = torch.arange(70) // 5
    logits = scale * image @ text.T
    of_images = -(logits.log_softmax(1) * (torch.arange(14)[:, None] == owner) / 5).sum(1).mean()
    of_texts = F.cross_entropy(logits.T, owner)
    loss = contrastive_loss(image, text, scale, labels=(torch.arange(14), owner))
    agree(loss, (of_images + of_texts) / 2, image, text, scale)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_without_a_partner_add_nothing_and_are_not_counted(reduction: str) -> None:
    image, text, scale = leaves(40, 33)
    of_images, of_texts = torch.arange(40) + 5, torch.arange(33)  # 28 pairs
    logits = scale * image @ text.T
    rows = F.cross_entropy(logits[:28], torch.arange(28) + 5, reduction=reduction)
    cols = F.cross_entropy(logits.T[5:], torch.arange(28), reduction=reduction)
    loss = contrastive_loss(image, text, scale, labels=(of_images, of_texts), reduction=reduction)
    agree(loss, (rows + cols) / 2, image, text, scale)


def test_without_any_partner_the_loss_is_zero_and_so_are_its_gradients() -> None:
    image, text, scale = leaves(40, 33)
    loss = contrastive_loss(image, text, scale, labels=(torch.arange(40), torch.arange(33) - 99))
    assert loss == 0
    for dx in torch.autograd.grad(loss, (image, text, scale)):
        assert (dx == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_positives_pick_a_column_for_each_row(symmetric: bool, smoothing: float) -> None:
    a, b, scale = leaves(40, 66)
    positives = torch.randperm(66, generator=torch.Generator().manual_seed(0))[:40]
    logits = scale * a @ b.T
    gold = F.cross_entropy(logits, positives, label_smoothing=smoothing, reduction="none")
    if symmetric:
        cols = F.cross_entropy(
            logits.T[positives], torch.arange(40), label_smoothing=smoothing, reduction="none"
        )
        gold = (gold + cols) / 2
    loss = contrastive_loss(
        a, b, scale, positives=positives, symmetric=symmetric, label_smoothing=smoothing, reduction="none"
    )
    assert loss.shape == (40,)
    upstream = torch.linspace(0, 1, 40, dtype=torch.float64)
    agree((upstream * loss).sum(), (upstream * gold).sum(), a, b, scale)


def test_a_locked_tower_gets_no_gradient_and_the_other_one_the_same_bits() -> None:
    a, b = unit(40, 24), unit(40, 24, seed=1)
    both = torch.autograd.grad(contrastive_loss(a.requires_grad_(), b.requires_grad_(), 9.0), (a, b))
    locked = contrastive_loss(a.detach(), b, 9.0)
    assert torch.equal(torch.autograd.grad(locked, b)[0], both[1])


def test_constants_get_no_gradient() -> None:
    a, b, queue, ta, tb = (unit(40, 24, seed=i).requires_grad_() for i in range(5))
    contrastive_loss(a, b, 9.0, negatives=queue, teacher=(ta, tb), alpha=0.5).backward()
    assert a.grad is not None
    assert queue.grad is ta.grad is tb.grad is None


@pytest.mark.parametrize("scale", [1e-3, 14.3, 100.0, 200.0])
def test_losses_are_exact_from_a_scale_of_a_thousandth_to_two_hundred(scale: float) -> None:
    inputs = LOSS.make_inputs({"B": 67, "D": 17}, "trained", torch.float32, 0)
    a, b = inputs["a"], inputs["b"]
    exact = contrastive_loss(a.double(), b.double(), scale)
    # two half-ulp roundings of the largest logit, in each of the loss's terms
    bound = 2 * torch.finfo(torch.float32).eps * max(scale, 1.0) * 1.5
    assert abs(contrastive_loss(a, b, scale).double() - exact) <= bound


def test_float16_features_whose_logits_overflow_float16_have_a_finite_loss() -> None:
    a = (300 * unit(40, 24)).half()
    assert (a @ a.T).isinf().any()
    loss = contrastive_loss(a, a, 1.0)
    gold = contrastive_loss(a.double(), a.double(), 1.0)
    assert loss.isfinite()
    torch.testing.assert_close(loss.double(), gold, rtol=1e-5, atol=1e-5)


def test_a_queue_that_is_still_empty_changes_nothing() -> None:
    a, b = unit(40, 24), unit(40, 24, seed=1)
    kwargs = {"symmetric": False, "teacher": (b, a), "alpha": 0.4}
    loss = contrastive_loss(a, b, 9.0, negatives=a[:0], **kwargs)
    torch.testing.assert_close(loss, contrastive_loss(a, b, 9.0, **kwargs))


def test_duplicated_pairs_lose_the_logarithm_of_two() -> None:
    a = torch.eye(16).repeat_interleave(2, 0)
    assert abs(contrastive_loss(a, a, 100.0).item() - math.log(2)) < 1e-6


class TestNormalized:
    a, b = unit(40, 48), unit(40, 48, seed=1)

    def test_gives_the_same_loss_within_rounding(self) -> None:
        plain = contrastive_loss(self.a, self.b, 100.0)
        torch.testing.assert_close(contrastive_loss(self.a, self.b, 100.0, normalized=True), plain)

    @pytest.mark.parametrize("broken", [0, 1])
    def test_a_wrong_claim_is_seen(self, broken: int) -> None:
        a, b = (
            x * torch.linspace(1, 1.02, 40)[:, None] if i == broken else x
            for i, x in enumerate((self.a, self.b))
        )
        message = f"{'ab'[broken]} must have rows of unit norm, as normalized=True claims, got .* norm 1.02"
        with pytest.raises(ValueError, match=message):
            contrastive_loss(a, b, 100.0, normalized=True)

    def test_a_scale_beyond_what_the_shift_carries_is_refused(self) -> None:
        with pytest.raises(ValueError, match="logit_scale must be at most 128 with normalized=True, got 150"):
            contrastive_loss(self.a, self.b, 150.0, normalized=True)

    def test_a_row_whose_terms_all_underflow_is_not_a_number_rather_than_a_wrong_one(self) -> None:
        a = -self.b[:1].expand(40, -1)
        b = self.b[:1].expand(40, -1)
        expected = torch.full((40,), math.log(40) - 100)
        torch.testing.assert_close(contrastive_stats(a, b, 100.0).row_lse, expected)
        claimed = contrastive_stats(a, b, 100.0, normalized=True).row_lse
        if gives_nan(a):
            assert claimed.isnan().all()
        else:  # a CPU shifts by the maxima
            torch.testing.assert_close(claimed, expected)

    def test_bfloat16_rounding_does_not_break_the_claim(self) -> None:
        loss = contrastive_loss(self.a.bfloat16(), self.b.bfloat16(), 100.0, normalized=True)
        torch.testing.assert_close(loss, contrastive_loss(self.a.bfloat16(), self.b.bfloat16(), 100.0))


def test_label_sums_are_a_product_with_the_matrix_of_equal_labels() -> None:
    for num, width, kinds in ((33, 5, 7), (40, 3, 1000), (1, 1, 1), (9, 2, 1)):
        x = torch.randn(num, width, dtype=torch.float64, requires_grad=True)
        of, labels = torch.randint(kinds, (num,)) - 3, torch.randint(kinds + 2, (17,)) - 3
        same = (labels[:, None] == of).double()
        upstream = torch.randn(17, width, dtype=torch.float64)
        sums = label_sums(x, of, labels)
        torch.testing.assert_close(sums, same @ x)
        torch.testing.assert_close(torch.autograd.grad(sums, x, upstream)[0], same.T @ upstream)
        first, count = first_match(labels, of)
        assert torch.equal(count, same.sum(1).long())
        assert torch.equal(first, torch.where(count > 0, same.argmax(1), -1))
    torch.library.opcheck(torch.ops.mmkernels.label_sums.default, (x, of, labels))


A = torch.ones(3, 4)
I = torch.arange(3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((A[0], A, 1.0), r"a must be \[M, D\], got shape \[4\]"),
        ((A[:, :0], A[:, :0], 1.0), r"a must be at least one wide, got shape \[3, 0\]"),
        ((A, A[:, :2], 1.0), r"b must be \[N, 4\], as wide as a, got shape \[3, 2\]"),
        ((A, A[None], 1.0), r"b must be \[N, D\], got shape \[1, 3, 4\]"),
        ((A, A.to("meta"), 1.0), "b must be on the device of a, cpu, got meta"),
        ((A, A.half(), 1.0), "b must have the dtype of a, torch.float32, got torch.float16"),
        ((A.int(), A.int(), 1.0), "a must be float32, .* got torch.int32"),
        ((A, A, math.inf), "logit_scale must be finite, got inf"),
        ((A, A, torch.tensor(math.nan)), "logit_scale must be finite, got nan"),
        ((A, A, torch.ones(2)), r"logit_scale must be a float or .* element, got shape \[2\]"),
        ((A, A, torch.tensor(1)), "logit_scale must be floating point, got torch.int64"),
        ((A, A, torch.ones((), device="meta")), "logit_scale must be on the device of a, cpu, got meta"),
    ],
)
@pytest.mark.parametrize("op", [contrastive_loss, contrastive_lse, contrastive_stats])
def test_bad_features_are_refused_by_name_contract_and_value(op, args, message: str) -> None:
    with pytest.raises(ValueError, match=f"^contrastive: {message}$"):
        op(*args)


@pytest.mark.parametrize(
    ("b", "kwargs", "message"),
    [
        (A[:2], {}, r"b must have the shape of a, \[3, 4\], got \[2, 4\]"),
        (A, {"positives": I.int()}, r"positives must be int64 \[3\], got torch.int32 \[3\]"),
        (A, {"positives": I[:2]}, r"positives must be int64 \[3\], got torch.int64 \[2\]"),
        (A, {"positives": I + 1}, r"positives must be from 0 to N - 1 = 2, got 1 to 3"),
        (A, {"positives": I - 1}, r"positives must be from 0 to N - 1 = 2, got -1 to 1"),
        (A, {"positives": I.to("meta")}, "positives must be on the device of a, cpu, got meta"),
        (A, {"positives": I, "labels": (I, I)}, "positives must be None where labels are given, got both"),
        (A, {"labels": (I, I[:2])}, r"labels\[1\] must be int64 \[3\], got torch.int64 \[2\]"),
        (A, {"labels": (I.float(), I)}, r"labels\[0\] must be int64 \[3\], got torch.float32 \[3\]"),
        (
            A,
            {"labels": (I, I), "reduction": "none"},
            "reduction must be 'mean' or 'sum' with labels and symmetric=True, got 'none'",
        ),
        (A, {"negatives": A[:, :2]}, r"negatives must be \[K, 4\], as wide as a, got shape \[3, 2\]"),
        (A, {"teacher": (A, A)}, "alpha must be above 0 with a teacher, got 0.0"),
        (A, {"alpha": 0.4}, "teacher must be given with alpha, got alpha=0.4"),
        (A, {"teacher": (A, A), "alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        (
            A,
            {"teacher": (A, A[:2]), "alpha": 0.4},
            r"teacher\[1\] must be torch.float32 \[3, 4\] like the student's, got torch.float32 \[2, 4\]",
        ),
        (
            A,
            {"teacher": (A.half(), A), "alpha": 0.4},
            r"teacher\[0\] must be torch.float32 \[3, 4\] like the student's, got torch.float16 \[3, 4\]",
        ),
        (A, {"label_smoothing": -0.1}, "label_smoothing must be from 0 to 1, got -0.1"),
        (A, {"reduction": "batchmean"}, r"reduction must be one of .*, got batchmean"),
    ],
)
def test_bad_arguments_are_refused_by_name_contract_and_value(b: Tensor, kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=f"^contrastive: {message}$"):
        contrastive_loss(A, b, 1.0, **kwargs)
