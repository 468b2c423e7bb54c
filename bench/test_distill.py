"""`mmkernels.distillation_loss` at heads of real sizes, beside DINO's expression and `torch.compile`."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id, time_case
from bench.measure import copy_bytes_per_s, paired_medians, relative_error
from mmkernels import distillation_loss
from mmkernels._spec import shape_id
from mmkernels.distill.spec import LOSS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TEMPS = (0.1, 0.04)


def eager(student: Tensor, teacher: Tensor, student_temp: float, teacher_temp: float, center: Tensor) -> Tensor:
    """As DINO has it, in float32."""
    target = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    return torch.sum(-target * F.log_softmax(student.float() / student_temp, dim=-1), dim=-1).mean()


Loss = Callable[[Tensor, Tensor, float, float, Tensor], Tensor]
CONTENDERS: dict[str, Loss] = {
    "mmkernels": distillation_loss,
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
}


def logits(num_rows: int, num_cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines as a DINO head gives them, a leaf for the student, and a centre."""
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = torch.randn(2, num_rows, num_cols, generator=generator, device=device).mul_(0.3).tanh_()
    center = 0.1 * torch.randn(num_cols, generator=generator, device=device)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), center


@functools.cache
def copy_rate(device: torch.device) -> float:
    return copy_bytes_per_s(device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", LOSS.bench_shapes[DEVICE], ids=shape_id)
def test_distillation_loss(benchmark, device, shape, contender, mode):
    student, teacher, center = logits(shape["B"], shape["C"], DTYPE, device)
    loss = CONTENDERS[contender]
    forward, backward = LOSS.cost(shape, student.element_size())
    cost = {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def error() -> float:
        found = torch.autograd.grad(loss(student, teacher, *TEMPS, center), student)[0]
        leaf = student.detach().double().requires_grad_()
        gold = torch.autograd.grad(eager64(leaf, teacher, center), leaf)[0]
        return relative_error(found, gold)

    case = Case(
        group=f"distillation_loss {dtype_id(DTYPE)} {shape_id(shape)}",
        contender=contender,
        loss=lambda: loss(student, teacher, *TEMPS, center),
        wrt=(student,),
        mode=mode,
        # the roofline is a copy of the bytes that have to move
        floor_s=cost.bytes_moved / copy_rate(device),
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=1.0,
        error=error,
    )
    time_case(benchmark, device, case)


def eager64(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    target = ((teacher.double() - center) / TEMPS[1]).softmax(1)
    return -(target * (student / TEMPS[0]).log_softmax(1)).sum(1).mean()


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
@pytest.mark.parametrize("shape", [(64, 65536), (512, 8192)], ids=str)
def test_on_a_cpu_it_is_twice_as_fast_as_eager(shape):
    device = torch.device("cpu")
    student, teacher, center = logits(shape[0], shape[1], torch.float32, device)
    runs = {
        name: lambda loss=CONTENDERS[name]: torch.autograd.grad(loss(student, teacher, *TEMPS, center), student)
        for name in ("mmkernels", "eager")
    }
    medians = paired_medians(runs, 7, device)
    ratio = medians["eager"] / medians["mmkernels"]
    print(f"eager {medians['eager']:.4f} s, mmkernels {medians['mmkernels']:.4f} s: {ratio:.2f}x")
    assert ratio >= 2.0
