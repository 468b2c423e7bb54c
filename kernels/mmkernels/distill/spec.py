"""The distillation loss's entries in the contract test and in bench."""

from collections.abc import Callable

import torch

from mmkernels._spec import Cost, Inputs, OpSpec, Shape
from mmkernels.distill.op import distillation_loss
from mmkernels.distill.reference import distillation_loss_ref


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
        cost=_cost,
        bench_shapes={
            "cpu": ({"B": 256, "C": 1000}, {"B": 512, "C": 8192}, {"B": 64, "C": 65536}),
            "cuda": ({"B": 2048, "C": 32000}, {"B": 4096, "C": 8192}, {"B": 640, "C": 65536}),
        },
        casts_under_autocast=False,
    )


def _cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    logits = shape["B"] * shape["C"]
    read = 2 * logits * element_size
    return Cost(0, read, 2 * logits), Cost(0, read + logits * element_size, 2 * logits)


LOSS = _variant("distillation_loss")
SPECS = (LOSS, _variant("distillation_loss[none]", reduction="none"))
