"""What `pytest bench/` collects: every op, layer and train step, on a machine without the optional packages too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import mmcore.nn
import mmkernels

ROOT = Path(__file__).parents[1]
# of what a machine with torch, transformers and pytest-benchmark may lack
HIDDEN = ("deepspeed", "tyro", "webdataset")
# no tensor goes in: a constant of H numbers
NO_TENSOR = ("alibi_slopes",)
# Linear, and a sum of two; a stack of Block, which the step of CLIP has
# of one process, BatchNorm is torch's; relative positions are in BEiT's step
IN_OTHERS = ("BatchNorm", "MLP", "RelativePositions", "Transformer")
HIDE = f"""
from importlib.machinery import PathFinder

found = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {HIDDEN} else found(name, path, target)


PathFinder.find_spec = find_spec
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What pytest prints of it: ids, and what is skipped."""
    folder = tmp_path_factory.mktemp("hide")
    (folder / "hide.py").write_text(HIDE)
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "hide"]
    env = {"PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def benched(name: str, collected: list[str]) -> bool:
    """Whether a case of ours has it in its test's name or its parameters."""
    place = re.compile(rf"(test_|[\[-]){name.rstrip('_')}_?[\[-]", re.IGNORECASE)
    return any(place.search(line) and re.search(r"mm(kernels|core)", line.partition("::")[2]) for line in collected)


OPS = [x for x in mmkernels.__all__ if x.islower() and not re.search("_ref_?$", x) and x not in ("masks", *NO_TENSOR)]


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_benched(op: str, collected: list[str]) -> None:
    assert benched(op, collected)


def is_layer(name: str) -> bool:
    found = getattr(mmcore.nn, name)
    return isinstance(found, type) and issubclass(found, nn.Module)


@pytest.mark.parametrize("layer", [x for x in mmcore.nn.__all__ if is_layer(x) and x not in IN_OTHERS])
def test_every_layer_is_benched(layer: str, collected: list[str]) -> None:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", layer)
    assert benched(layer, collected) or benched(words, collected)


@pytest.mark.parametrize("step", ["clip_step", "blip2_stage1", "blip2_stage2", "llava_stage2", "moco_step"])
def test_every_train_step_is_benched(step: str, collected: list[str]) -> None:
    assert benched(step, collected)


def test_what_is_not_benched_is_not_taken_for_it(collected: list[str]) -> None:
    assert not benched("contrastive", collected) and not benched("loss", collected)


def test_what_a_file_lacks_is_its_reason_to_be_skipped(collected: list[str]) -> None:
    skipped = [line for line in collected if line.startswith("SKIPPED")]
    assert len(skipped) == 1 and skipped[0].endswith(" is not installed"), skipped
