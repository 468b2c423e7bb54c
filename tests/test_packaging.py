"""What a wheel holds, and that the bare install needs torch and triton alone."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NATIVE = "mmkernels/_native.so"
BUILDS_NATIVE = bool(shutil.which("cmake") and shutil.which("c++"))
needs_compiler = pytest.mark.skipif(not BUILDS_NATIVE, reason="needs cmake and a C++ compiler")


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] = os.environ, code: int | None = 0) -> str:
    """What Python prints; None = any exit but 0."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=dict(env), capture_output=True, text=True)
    assert done.returncode == code or (code is None and done.returncode), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, so that no build folder is left among them."""
    folder = tmp_path_factory.mktemp("tree")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run("setup.py", "-q", "sdist", "-d", folder, cwd=tree)
    return next(folder.glob("*.tar.gz"))


def build_wheel(source: Path, folder: Path, env: Mapping[str, str] = os.environ) -> Path:
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder, env=env)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


def held_by(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def every_module() -> set[str]:
    found = {str(p.relative_to(ROOT)) for p in (ROOT / "mmcore").rglob("*.py")}
    found |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels/mmkernels").rglob("*.py")}
    return found | {"mmcore/py.typed", "mmkernels/py.typed"}


def test_a_wheel_of_the_sdist_holds_every_module_of_both_packages(wheel):
    assert held_by(wheel) - {NATIVE} == every_module()


@needs_compiler
def test_a_compiler_makes_it_a_wheel_for_this_platform_and_any_python(wheel):
    assert NATIVE in held_by(wheel)
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")


def test_a_wheel_without_the_native_step_is_for_any_platform(tree, tmp_path):
    wheel = build_wheel(tree, tmp_path, os.environ | {"MMKERNELS_NATIVE": "0"})
    assert held_by(wheel) == every_module()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_build_says_why_it_leaves_the_native_step_out(tree, tmp_path):
    said = "the CPU's native step is not built, ATen serves in its place: "
    off = {"MMKERNELS_NATIVE": "0"}
    for env, reason in (({"PATH": str(tmp_path)}, "there is no cmake"), (off, "MMKERNELS_NATIVE=0")):
        assert said + reason in run("setup.py", "--name", cwd=tree, env=os.environ | env)


@needs_compiler
def test_a_compile_error_fails_the_build(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    with (tmp_path / "tree/kernels/csrc/tile.cpp").open("a") as source:
        source.write("#error planted\n")
    assert "planted" in run("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path / "tree", code=None)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An empty environment in which pip has put the wheel of the sdist, its requirements found; of what this one has
    it sees the packages, but not the editable install."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    run("-m", "pip", "--python", folder / "bin/python", "install", "-q", "--no-index", wheel, cwd=folder)
    return folder


def test_the_op_of_a_wheel_runs_in_an_empty_environment_and_folder_without_the_training_packages(environment, tmp_path):
    program = (
        "import sys, torch; from mmkernels import contrastive_loss; import mmkernels.native, mmcore.losses\n"
        "x = torch.randn(300, 16, requires_grad=True); contrastive_loss(x, x, 2.0).backward()\n"
        "wanted = {'deepspeed', 'transformers', 'tyro', 'webdataset', 'matplotlib'} & set(sys.modules)\n"
        "assert not wanted, wanted; print(mmkernels.native.AVAILABLE, mmkernels.__file__, mmcore.losses.__file__)"
    )
    command, env = [environment / "bin/python", "-I", "-c", program], {"OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    available, *files = done.stdout.split()
    assert available == str(BUILDS_NATIVE)
    assert all(Path(file).is_relative_to(environment) for file in files), files
    assert (environment / "bin/mmcore").is_file()


def test_what_a_wheel_requires_is_looked_for(environment, wheel, tmp_path):
    """So that the test above cannot pass with a requirement missing."""
    venv.create(tmp_path / "bare")
    pip = ("-m", "pip", "--python", tmp_path / "bare/bin/python", "install", "-q", "--no-index")
    found = run(*pip, wheel, cwd=tmp_path, code=None)
    assert re.search("No matching distribution found for (torch|triton)>=", found)


def test_a_library_that_does_not_load_is_an_error_that_says_what_to_do(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "site" / NATIVE).write_bytes(b"not a library")
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    said = run("-c", "import mmkernels.native", cwd=tmp_path, env=env, code=None)
    assert re.search(r"ImportError: mmkernels: .*_native.so must load .* set MMKERNELS_NATIVE=0", said)
    program = "import mmkernels.native; assert not mmkernels.native.AVAILABLE"
    run("-c", program, cwd=tmp_path, env=env | {"MMKERNELS_NATIVE": "0"})


def test_every_tested_version_is_pinned(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    requires = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata, re.MULTILINE)
    needed = {name for name, rest in requires if "extra" not in rest or "'train'" in rest or '"train"' in rest}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "deepspeed"} <= needed <= pinned
