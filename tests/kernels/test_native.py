"""When native code runs, what it refuses, and that no thread and no instruction set changes what it promises."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmkernels import attention, distillation_loss, global_norm, masks, native
from mmkernels._tile import grad_tile, sigmoid_tile
from tests.kernels.recorded import Operations
from tests.kernels.tensor_lists import tensors
from tests.kernels.tile_cases import draw, fold, labels, statistics

needs_native = pytest.mark.skipif(
    not native.AVAILABLE, reason="the native step is not built: python setup.py build_ext --inplace"
)


def tiles() -> list[Tensor]:
    cosines = draw("random", 333, 1030)
    out, row_loss = torch.empty_like(cosines), torch.zeros(333)
    total = grad_tile(cosines, 50.0, *statistics(cosines, 50.0), None, 0.5, out)
    sums = sigmoid_tile(cosines, 50.0, -10.0, *labels(*cosines.shape), row_loss, None)
    return [total, out, sums, row_loss, *(x for both in fold(cosines, 50.0) for x in both)]


def distillation() -> list[Tensor]:
    student, teacher = (3 * draw("random", 300, 500, seed).requires_grad_() for seed in (0, 1))
    losses = distillation_loss(student, teacher, 0.1, 0.04, reduction="none")
    return [losses, *torch.autograd.grad(losses.sum(), student)]


def attended() -> list[Tensor]:
    q, k, v = (
        draw("random", 2 * n, h * 24, h).view(2, n, h, 24).requires_grad_() for n, h in ((300, 4), (900, 2), (900, 2))
    )
    mask = masks.causal(300, 900) & masks.lengths(torch.tensor([700, 900]), 300, 900)
    out, lse = attention(q, k, v, mask=mask, dropout_p=0.2, seed=1, return_lse=True)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))]


RUNS: dict[str, Callable[[], list[Tensor]]] = {
    "tiles": tiles,
    "distillation": distillation,
    "attention": attended,
    "norm": lambda: [global_norm(tensors([100_000, 77, 300_001], torch.float32, 0))],
}


@needs_native
@pytest.mark.parametrize("name", RUNS)
def test_no_bit_depends_on_the_number_of_threads(name: str, streamed: None) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(RUNS[name]())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other, results[0], strict=True))


def test_native_code_serves_float32_where_it_is_built(path) -> None:
    ours = {"fold_tile", "grad_tile", "sigmoid_tile"}
    for dtype in (torch.float32, torch.float64):
        cosines = draw("random", 4, 6).to(dtype)
        with Operations() as seen:
            row, col = fold(cosines, 2.0)
            grad_tile(cosines, 2.0, row, col, None, None, torch.empty_like(cosines))
            sigmoid_tile(cosines, 2.0, -1.0, *labels(4, 6), row[0], None)
        assert seen.names.keys() & ours == (ours if (path, dtype) == ("native", torch.float32) else set())


@needs_native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets_keep_every_promise(capability: str) -> None:
    """The native tests once more in a process that is told, as torch is, to use a lesser instruction set."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native and not lesser"]
    folder = Path(__file__).parent
    command += map(str, [*folder.glob("test_tile*.py"), folder / "test_attention.py"])
    done = subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
