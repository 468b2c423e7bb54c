"""What a wheel holds, and that the bare install needs torch and triton alone."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        folder / "tree",
    ]
    subprocess.run(build, check=True, cwd=folder)
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_every_module_of_both_packages(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "mmcore").rglob("*.py")}
    expected |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels/mmkernels").rglob("*.py")}
    assert held == expected | {"mmcore/py.typed", "mmkernels/py.typed"}


def test_the_op_of_a_wheel_runs_in_an_empty_folder_without_the_training_packages(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site"], check=True)
    program = (
        "import sys, torch; from mmkernels import contrastive_loss; import mmkernels, mmcore.losses\n"
        "x = torch.randn(300, 16, requires_grad=True); contrastive_loss(x, x, 2.0).backward()\n"
        "wanted = {'deepspeed', 'transformers', 'tyro', 'webdataset', 'matplotlib'} & set(sys.modules)\n"
        "assert not wanted, wanted; print(mmkernels.__file__)"
    )
    (tmp_path / "empty").mkdir()
    env = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "PATH": ""}
    command, where = [sys.executable, "-c", program], tmp_path / "empty"
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_every_tested_version_is_pinned(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    requires = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata, re.MULTILINE)
    needed = {
        name for name, rest in requires if "extra" not in rest or "'train'" in rest or '"train"' in rest
    }
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {"torch", "deepspeed"} <= needed <= pinned
