"""The Triton kernels under the interpreter, in a process where it was chosen before the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels._device import INTERPRETED

# files, and which of their tests, so that no process takes more than minutes
RUNS = (
    ("test_adamw_update.py", ""),
    ("test_attention.py", ""),
    ("test_contract.py", "attention and (bound or reference)"),
    ("test_contract.py", "attention and not bound and not reference"),
    ("test_contract.py", "not attention and not loss"),
    ("test_contract.py", "not attention and loss"),
    ("test_contract_detects.py", "attention"),
    ("test_contract_detects.py", "not attention"),
    ("test_contrastive.py", ""),
    ("test_contrastive_arguments.py", ""),
    ("test_distill.py", ""),
    ("test_apply_masks.py", ""),
    ("test_ema_update.py", ""),
    ("test_ewc.py", ""),
    ("test_global_norm.py", ""),
    ("test_sigmoid.py", ""),
    ("test_linear_cross_entropy.py", ""),
    ("test_token_contrastive.py", ""),
)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this process runs the interpreter already")
@pytest.mark.parametrize(("file", "chosen"), RUNS)
def test_the_kernels_pass_under_the_interpreter(file: str, chosen: str) -> None:
    # the interpreter's many small array operations only lose time to threads
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-m", "not gpu", "-k", chosen]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name(file))],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
