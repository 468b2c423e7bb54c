"""Losses of self-distillation over all ranks: views of an image agree, masked patches are told, features spread."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcore.losses.matching import global_ratio, row_counts
from mmcore.losses.ranks import OVER_RANKS, Group, gather_rows, scatter_sum
from mmcore.ops import require, untransformed
from mmkernels import distillation_loss

# of what is a logarithm of zero
_TINY = 1e-8


def view_distillation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_temp: float,
    teacher_temp: float,
    center: Tensor | None = None,
    *,
    group: Group = None,
) -> Tensor:
    """DINO's loss: the mean over pairs of a teacher's view q and another view v of the student, and over the images of
    all ranks, of -sum_c softmax((t_q - center) / teacher_temp)_c log_softmax(s_v / student_temp)_c.

    Every rank gets the same value, and gradients whose *mean* over ranks is that of one process.

    Args:
        student: logits `[B, K]` of each view of this rank's images, those of the teacher first, in its order.
        teacher: logits `[B, K]`, constants, of fewer views or as many.
        student_temp, teacher_temp, center: of `mmkernels.distillation_loss`.
        group: the data-parallel process group; None = the default one, or one process where none is set up.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: no view, one view alone, more views of the teacher, and as `mmkernels.distillation_loss`.

    Paper: arXiv:2104.14294.
    """
    fits = len(student) >= 2 and 1 <= len(teacher) <= len(student)
    got = f"{len(student)} and {len(teacher)}"
    require("view_distillation_loss", fits, "student must have two views or more, teacher 1 to as many, got {}", got)
    pairs = [(s, t) for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
    options: dict[str, Any] = {"center": center, "reduction": "sum"}
    sums = [distillation_loss(s, t, student_temp, teacher_temp, **options) for s, t in pairs]
    return global_ratio(torch.stack(sums).mean(), torch.tensor(len(student[0]), device=sums[0].device), group)


def patch_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    shares: Tensor,
    num_images: int,
    student_temp: float,
    teacher_temp: float,
    center: Tensor | None = None,
    *,
    group: Group = None,
) -> Tensor:
    """iBOT's loss: the cross-entropy of masked patches and what the teacher makes of the same patches, the mean over
    the masked patches of an image, then over the images of all ranks; an image without a masked patch gives 0.

    Gradients and values over ranks as of `view_distillation_loss`.

    Args:
        student: logits `[N, K]` of this rank's masked patches; N may be 0.
        teacher: logits `[N, K]` of the same patches, constants.
        shares: `[N]`, 1 over the number of masked patches of the patch's image.
        num_images: of this rank, masked or not.
        student_temp, teacher_temp, center: of `mmkernels.distillation_loss`.
        group: the data-parallel process group.

    Returns:
        A scalar, float32 (float64 for float64).

    Paper: arXiv:2111.07832.
    """
    fits = shares.shape == student.shape[:1]
    got = f"{list(shares.shape)} for {list(student.shape)}"
    require("patch_distillation_loss", fits, "shares must be [N] for student [N, K], got {}", got)
    each = distillation_loss(student, teacher, student_temp, teacher_temp, center, reduction="none")
    return global_ratio((each * shares.to(each.dtype)).sum(), torch.tensor(num_images, device=each.device), group)


def koleo_loss(x: Tensor, *, group: Group = None) -> Tensor:
    """The Kozachenko-Leonenko estimate of minus the entropy of features, but for a constant: -mean_i log d_i, d_i the
    distance of unit-norm row i to the nearest other row among all ranks' (arXiv:1806.03198; DINOv2, arXiv:2304.07193).

    Equal rows have a finite loss and gradient. Gradients and values over ranks as of `view_distillation_loss`.

    Args:
        x: features `[B, D]` of this rank, floating point; B may differ by rank.
        group: the data-parallel process group.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: another shape, and fewer than two rows on all ranks.
    """
    op = "koleo_loss"
    require(op, x.ndim == 2, "x must be [B, D], got {}", list(x.shape))
    counts = row_counts(len(x), x.device, group)
    require(op, sum(counts) >= 2, "x must have two rows or more on all ranks, got {}", sum(counts))
    x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
    rows = x if len(counts) == 1 else _gathered(x, counts, group)
    first = sum(counts[: dist.get_rank(group)]) if len(counts) > 1 else 0
    with torch.no_grad():
        cosines = x @ rows.T
        cosines.diagonal(first).fill_(-torch.inf)
        nearest = cosines.argmax(1)
    # as torch.nn.PairwiseDistance, whose gradient is finite where rows are equal
    distances = (x - rows[nearest] + _TINY).norm(dim=1)
    return global_ratio(-(distances + _TINY).log().sum(), torch.tensor(len(x), device=x.device), group)


def gram_loss(student: Tensor, teacher: Tensor, *, group: Group = None) -> Tensor:
    """DINOv3's Gram anchoring: the mean squared difference of the cosines among an image's patches and those among the
    same patches of an earlier model, over all pairs of patches and the images of all ranks.

    Gradients and values over ranks as of `view_distillation_loss`.

    Args:
        student: states of patches `[B, P, D]`, floating point.
        teacher: states `[B, P, E]`, constants.
        group: the data-parallel process group.

    Returns:
        A scalar, float32 (float64 for float64).

    Paper: arXiv:2508.10104.
    """
    fits = student.ndim == 3 and teacher.ndim == 3 and teacher.shape[:2] == student.shape[:2]
    got = f"{list(teacher.shape)} beside {list(student.shape)}"
    require("gram_loss", fits, "teacher must be [B, P, E] for student [B, P, D], got {}", got)
    grams = []
    for x in (student, teacher.detach()):
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=2)
        grams.append(x @ x.transpose(1, 2))
    each = (grams[0] - grams[1]).square().mean((1, 2))
    return global_ratio(each.sum(), torch.tensor(len(each), device=each.device), group)


def _gathered(x: Tensor, counts: tuple[int, ...], group: Group) -> Tensor:
    untransformed("koleo_loss", OVER_RANKS, {"x": [x]})
    return _Gathered.apply(x, counts, group)  # pyright: ignore[reportReturnType]


class _Gathered(torch.autograd.Function):
    """All ranks' rows; the gradient of a row is the sum of what each rank's loss makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return scatter_sum(grad.contiguous(), ctx.counts, ctx.group), None, None
