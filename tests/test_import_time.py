"""What `import mmkernels` costs a program that has torch."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 0.2
# torch once; each child then imports what is ours for the first time
PROGRAM = """
import json, os, sys, time
import torch

for _ in range(5):
    if os.fork() == 0:
        before, began = set(sys.modules), time.process_time()
        import mmkernels

        seconds, new = time.process_time() - began, set(sys.modules) - before
        print(json.dumps({"seconds": seconds, "modules": sorted(new)}))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imports() -> list[dict]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_mmkernels_is_imported_in_a_fifth_of_a_second_beyond_torch(imports: list[dict]) -> None:
    """Of CPU time, the median of five, so that other processes do not count."""
    seconds = [one["seconds"] for one in imports]
    print(f"import mmkernels: {seconds} s")
    assert len(seconds) == 5 and statistics.median(seconds) < LIMIT_S


def test_importing_mmkernels_brings_neither_triton_nor_dynamo_with_it(imports: list[dict]) -> None:
    """Each takes longer than all of ours; a kernel's first call imports the one, torch.compile the other."""
    brought = set(imports[0]["modules"])
    assert "mmkernels.attention" in brought
    assert not brought & {"triton", "torch._dynamo"}, brought
