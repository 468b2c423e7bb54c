"""`mmkernels.distillation_loss`: its entries in the contract test, and heads of real sizes beside DINO's expression and
`torch.compile`; the roofline is a copy of the bytes that have to move."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id
from bench.harness import CPU, DEVICE, DTYPE, ON_GPU, Bench, Claims, assert_faster, gradient_case, of_mode
from bench.spec import Inputs, OpSpec, Shape, shape_id
from mmkernels import distillation_loss, distillation_loss_ref
from mmkernels._cost import Cost


def make_logits(num_rows: int, num_cols: int, case: str, seed: int) -> Inputs:
    """Logits in float64 and the temperatures at which such are met.

    plain: deviation 3, temperature 2, as in knowledge distillation. sharp: cosines of a DINO head at its
        temperatures, with a centre. masked: a fifth of the classes is -inf for both.
    """
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, num_rows, num_cols, generator=generator, dtype=torch.float64)
    if case == "sharp":
        student, teacher = (x.tanh() for x in (student, student + 0.5 * noise))
        center = 0.1 * torch.randn(num_cols, generator=generator, dtype=torch.float64)
        return {"student": student, "teacher": teacher, "student_temp": 0.1, "teacher_temp": 0.04, "center": center}
    student, teacher = 3 * student, 3 * (student + noise)
    if case == "masked":
        masked = torch.rand(student.shape, generator=generator) < 0.2
        masked[:, 0] = False
        student, teacher = (x.masked_fill(masked, -torch.inf) for x in (student, teacher))
    return {"student": student, "teacher": teacher, "student_temp": 2.0, "teacher_temp": 2.0}


def _variant(name: str, **options: object) -> OpSpec:
    def make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
        inputs = make_logits(shape["B"], shape["C"], case, seed)
        return {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()} | options

    def draw_shape(draw: Callable[[int, int], int]) -> Shape:
        return {"B": draw(1, 40), "C": draw(2, 140)}

    return OpSpec(
        name=name,
        op=distillation_loss,
        ref=distillation_loss_ref,
        make_inputs=make_inputs,
        shapes=({"B": 1, "C": 2}, {"B": 33, "C": 33}, {"B": 3, "C": 201}),
        draw_shape=draw_shape,
        cases=("plain", "sharp", "masked"),
        differentiable=("student",),
        casts_under_autocast=False,
    )


def _cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    logits = shape["B"] * shape["C"]
    read = 2 * logits * element_size
    return Cost(0, read, 2 * logits), Cost(0, read + logits * element_size, 2 * logits)


LOSS = _variant("distillation_loss")
SPECS = (LOSS, _variant("distillation_loss[none]", reduction="none"))

TEMPS = (0.1, 0.04)
SHAPES = (
    ({"B": 2048, "C": 32000}, {"B": 4096, "C": 8192}, {"B": 640, "C": 65536})
    if ON_GPU
    else ({"B": 256, "C": 1000}, {"B": 512, "C": 8192}, {"B": 64, "C": 65536})
)
Loss = Callable[[Tensor, Tensor, float, float, Tensor], Tensor]


def eager(student: Tensor, teacher: Tensor, student_temp: float, teacher_temp: float, center: Tensor) -> Tensor:
    """As DINO has it, in float32."""
    target = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    return torch.sum(-target * F.log_softmax(student.float() / student_temp, dim=-1), dim=-1).mean()


def eager64(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    target = ((teacher.double() - center) / TEMPS[1]).softmax(1)
    return -(target * (student / TEMPS[0]).log_softmax(1)).sum(1).mean()


CONTENDERS: dict[str, Callable[[], Loss]] = {
    "mmkernels": lambda: distillation_loss,
    "eager": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
}


def logits(num_rows: int, num_cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines as a DINO head gives them, a leaf for the student, and a centre."""
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = torch.randn(2, num_rows, num_cols, generator=generator, device=device).mul_(0.3).tanh_()
    center = 0.1 * torch.randn(num_cols, generator=generator, device=device)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), center


def _case(shape: Shape, contender: str, mode: str) -> Case:
    student, teacher, center = logits(shape["B"], shape["C"], DTYPE, DEVICE)
    loss = CONTENDERS[contender]()

    def gold() -> Tensor:
        leaf = student.detach().double().requires_grad_()
        return torch.autograd.grad(eager64(leaf, teacher, center), leaf)[0]

    return gradient_case(
        f"distillation_loss {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: loss(student, teacher, *TEMPS, center),
        (student,),
        mode,
        of_mode(mode, *_cost(shape, student.element_size())),
        gold=gold,
    )


BENCHES = (Bench("distillation_loss", _case, {"shape": SHAPES, "contender": tuple(CONTENDERS), "mode": MODES}),)


def _is_twice_as_fast_as_eager(num_rows: int, num_cols: int) -> None:
    student, teacher, center = logits(num_rows, num_cols, torch.float32, CPU)
    ours, other = (lambda loss=loss: loss(student, teacher, *TEMPS, center) for loss in (distillation_loss, eager))
    assert_faster(ours, other, (student,), least=2.0)


CLAIMS: Claims = {
    f"twice as fast as eager at {rows} x {cols}": partial(_is_twice_as_fast_as_eager, rows, cols)
    for rows, cols in ((64, 65536), (512, 8192))
}
