"""The Triton kernels under the interpreter, in a process where it was chosen before the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels._device import INTERPRETED

# files, and which of their tests, so that no process takes more than minutes
RUNS = (
    ("contract", "attention and (bound or reference)"),
    ("contract", "attention and not bound and not reference"),
    ("contract", "not attention and not loss"),
    ("contract", "not attention and loss"),
    ("contract_detects", "attention"),
    ("contract_detects", "not attention"),
    ("derivatives losses contrastive token_contrastive maxsim sigmoid linear_cross_entropy", ""),
    ("launch attention distill adamw_update apply_masks ema_update ewc global_norm multi_tensor", ""),
)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this process runs the interpreter already")
@pytest.mark.parametrize(("files", "chosen"), RUNS)
def test_the_kernels_pass_under_the_interpreter(files: str, chosen: str) -> None:
    # the interpreter's many small array operations only lose time to threads
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-m", "not gpu", "-k", chosen]
    result = subprocess.run(
        [*command, *(str(Path(__file__).with_name(f"test_{file}.py")) for file in files.split())],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
