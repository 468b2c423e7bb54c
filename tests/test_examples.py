"""Each example runs as its first lines say, and learns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import environment, free_port

ROOT = Path(__file__).parents[1]
RANKS = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1")


def run(*command: str) -> str:
    """What it prints."""
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def on_two_ranks(*command: str) -> str:
    return run(*RANKS, f"--master_port={free_port()}", *command)


def numbers(text: str, pattern: str) -> list[float]:
    return [float(x) for found in re.findall(pattern, text) for x in (found if isinstance(found, tuple) else [found])]


def test_open_clips_loop_learns_and_two_ranks_go_one_way() -> None:
    command = ("examples/open_clip_loop.py", "--epochs", "4")
    alone, together = run(*command), on_two_ranks(*command)
    for kind in (r"loss ([\d.]+)", r"scans: ([\d.]+)"):
        found = numbers(alone, kind)
        assert found
        # of the same batches; three digits are printed
        assert numbers(together, kind) == pytest.approx(found, abs=4e-3)
    assert numbers(alone, r"scans: ([\d.]+)")[0] > 0.8


def test_transformers_trainer_under_deepspeed_learns_on_two_ranks() -> None:
    said = on_two_ranks("-m", "tests.run_example", "examples/trainer_deepspeed.py", "--steps", "60")
    assert numbers(said, r"scans: ([\d.]+)")[0] > 0.75


def test_pages_are_found_by_late_interaction_with_chunks_of_the_batch() -> None:
    assert numbers(run("examples/late_interaction.py", "--steps", "30"), r"pages: ([\d.]+)")[0] > 0.9


def test_moco_learns_what_an_untrained_encoder_does_not_know() -> None:
    before, after = numbers(run("examples/moco.py", "--steps", "200"), r"neighbour: ([\d.]+) before, ([\d.]+) after")
    assert after > before + 0.07
