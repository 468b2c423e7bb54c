"""What the distillation loss promises beyond the contract that every op obeys."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import distillation_loss, distillation_loss_ref
from mmkernels._device import INTERPRETED

# the interpreter runs the kernels alone
FORMS = ["streamed"] if INTERPRETED else ["streamed", "aten", "eager_form"]


@pytest.fixture(params=FORMS, autouse=True)
def form(request: pytest.FixtureRequest) -> None:
    """Small shapes in every way: the registered op, natively if that is built and by ATen, and the eager form."""
    if request.param != "eager_form":
        request.getfixturevalue("streamed")
    if request.param == "aten":
        request.getfixturevalue("aten_steps")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(loss: Tensor, gold: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(loss, gold, rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(gold, leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-9, atol=1e-13)


def test_dino_sums_every_pair_of_different_crops() -> None:
    """arXiv:2104.14294, algorithm 1 with its multi-crop loop written out."""
    student = logits(4, 6, 40).requires_grad_()  # crops, images, classes
    teacher, center = logits(2, 6, 40, seed=1), logits(40, seed=2)
    gold = loss = torch.zeros((), dtype=torch.float64)
    pairs = [(q, v) for q in range(2) for v in range(4) if q != v]
    for q, v in pairs:
        target = F.softmax((teacher[q] - center) / 0.04, dim=-1)
        gold = gold + torch.sum(-target * F.log_softmax(student[v] / 0.1, dim=-1), dim=-1).mean() / len(pairs)
        loss = loss + distillation_loss(student[v], teacher[q], 0.1, 0.04, center) / len(pairs)
    views = torch.cat([student[v] for _, v in pairs]), torch.cat([teacher[q] for q, _ in pairs])
    in_rows = distillation_loss(views[0], views[1], 0.1, 0.04, center)
    torch.testing.assert_close(in_rows, gold, rtol=1e-10, atol=1e-12)
    agree(loss, gold, student)


def test_knowledge_distillation_is_the_divergence_but_for_a_constant() -> None:
    """arXiv:1503.02531 at T = 4: the same gradient as T^2 KL(teacher || student), the factor the caller's."""
    student, teacher = logits(9, 31).requires_grad_(), logits(9, 31, seed=1)
    divergence = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
    entropy = torch.distributions.Categorical(logits=teacher / 4).entropy().mean()
    agree(16 * distillation_loss(student, teacher, 4.0, 4.0), 16 * (divergence + entropy), student)


def test_masked_classes_add_nothing_and_get_no_gradient() -> None:
    student, teacher = logits(7, 33), logits(7, 33, seed=1)
    kept = torch.rand(33, generator=torch.Generator().manual_seed(2)) < 0.5
    gold_leaf = student[:, kept].requires_grad_()
    gold = distillation_loss_ref(gold_leaf, teacher[:, kept], 2.0, 3.0)
    leaf = student.masked_fill(~kept, -math.inf).requires_grad_()
    loss = distillation_loss(leaf, teacher.masked_fill(~kept, -math.inf), 2.0, 3.0)
    torch.testing.assert_close(loss, gold)
    grad = torch.autograd.grad(loss, leaf)[0]
    assert (grad[:, ~kept] == 0).all()
    torch.testing.assert_close(grad[:, kept], torch.autograd.grad(gold, gold_leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_class_that_only_the_student_masks_makes_the_loss_infinite(dtype: torch.dtype) -> None:
    student, teacher = logits(3, 40).to(dtype), logits(3, 40, seed=1).to(dtype)
    student[1, 5] = -math.inf
    losses = distillation_loss(student, teacher, 1.0, 1.0, reduction="none")
    assert losses.isinf().tolist() == [False, True, False]


def test_sharp_temperatures_keep_small_losses_exact() -> None:
    """Logits of 1000 after division: the loss, 1e-4, must not be made of ulps of 1000, 6e-5."""
    student = torch.zeros(2, 40)
    student[:, 3], student[:, 4] = 10.0, 10.0 - 0.0921034  # the second class e^-9.21 behind
    gold = distillation_loss(student.double(), student.double(), 0.01, 1e-3)
    loss = distillation_loss(student, student, 0.01, 1e-3)
    assert 5e-5 < gold < 2e-4
    assert abs(loss.double() - gold) < 2e-7


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_teacher_may_have_another_dtype(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = (logits(5, 40).to(student_dtype).requires_grad_(), logits(5, 40, seed=1).to(teacher_dtype))
    center = logits(40, seed=2)
    loss = distillation_loss(student, teacher, 0.5, 0.3, center)
    gold = distillation_loss_ref(student.double(), teacher.double(), 0.5, 0.3, center)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), gold, rtol=1e-5, atol=1e-5)
    grad = torch.autograd.grad(loss, student)[0]
    assert grad.dtype == student_dtype
    expected = torch.autograd.grad(gold, student)[0]
    torch.testing.assert_close(grad, expected, rtol=2e-2 if student_dtype != torch.float32 else 1e-4, atol=1e-6)


def test_temperatures_may_be_tensors_and_constants_get_no_gradient() -> None:
    student, teacher = logits(5, 40).requires_grad_(), logits(5, 40, seed=1).requires_grad_()
    center = logits(40, seed=2).requires_grad_()
    loss = distillation_loss(student, teacher, torch.tensor([0.5]), torch.tensor(0.25), center)
    torch.testing.assert_close(loss, distillation_loss_ref(student, teacher, 0.5, 0.25, center))
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is center.grad is None
