"""Bugs to plant in the distillation paths: each is one edit of a path's source, which the contract must see."""

from mmkernels.distill import blockwise, kernel, op
from mmkernels.distill.spec import SPECS
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "student's temperature taken for the teacher's": (
        "_shifted(teacher, temps[1], stats[2]).exp_()\n",
        "_shifted(teacher, temps[0], stats[2]).exp_()\n",
    ),
    "centre ignored in forward": (
        "    teacher = teacher if center is None else teacher - center\n    for i",
        "    for i",
    ),
    "centre ignored in backward": (
        "    teacher = teacher if center is None else teacher - center\n    scale",
        "    scale",
    ),
    "temperature's factor on the gradient lost": ("scale = grad / temps[0]", "scale = grad / 1"),
    "teacher's sum not divided by": ("cross.div_(stats[3])", "cross"),
    "wrong factor on the gradient": (
        "mul_((scale / stats[1])[:, None])",
        "mul_((1.001 * scale / stats[1])[:, None])",
    ),
    "last rows left out": ("range(0, len(x), num_rows)", "range(0, len(x) - 1, num_rows)"),
    "missing cast": (
        "x, y = _shifted(student, temps[0], stats[0]), _shifted",
        "x, y = _shifted(student, temps[0], stats[0]).half().to(stats.dtype), _shifted",
    ),
    "upstream gradient ignored": ("scale = grad / temps[0]", "scale = torch.ones_like(grad) / temps[0]"),
}
KERNEL = {
    "teacher's temperature ignored in forward": (
        "        y = y / teacher_temp\n        old_max",
        "        old_max",
    ),
    "centre ignored in forward": (
        "        if HAS_CENTER:\n            y -=",
        "        if False:\n            y -=",
    ),
    "centre ignored in backward": ("    if HAS_CENTER:\n        y -=", "    if False:\n        y -="),
    "sums not rescaled to the new maximum": ("old_sum * tl.exp(old_max - shift)", "old_sum"),
    "cross not rescaled to the new maximum": ("(cross + moved) * shrink", "(cross + moved)"),
    "cross not moved with the student's maximum": ("(cross + moved) * shrink", "cross * shrink"),
    "cross of a split not moved": ("((crosses + moved) * shrink[1])", "(crosses * shrink[1])"),
    "one class left out of a split": ("mask_n = offs_n < last_n", "mask_n = offs_n < last_n - 1"),
    "wrong factor on the gradient": (
        "scale = tl.load(grad_ptr + row) / student_temp",
        "scale = tl.load(grad_ptr + row)",
    ),
    "missing cast": (
        'other=float("-inf")).to(tl.float32) / student_temp',
        'other=float("-inf")).to(tl.float16).to(tl.float32) / student_temp',
    ),
    "unwritten column": (
        "tl.store(dstudent_ptr + row * stride_db + offs_n, out, mask=mask_n)",
        "tl.store(dstudent_ptr + row * stride_db + offs_n, out, mask=offs_n < C - 1)",
    ),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    cases=("plain", "sharp"),
    checks=tuple((spec, shape) for spec in SPECS for shape in spec.shapes[1:]),
)
