"""A user's own package adds a system: installed, trained, measured, exported, planned, proved without an edit here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import environment
from tests.processes import ROOT

EXAMPLE = ROOT / "examples/own_recipe"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example is installed into."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(EXAMPLE)], check=True, cwd=folder)
    return folder


def mmcore(site: Path, *arguments: object, code: int = 0) -> Any:
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(site), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "mmcore", *map(str, arguments)]
    done = subprocess.run(command, cwd=site, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == code and "Traceback" not in done.stderr, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done


def test_a_package_of_ones_own_trains_is_measured_exported_planned_and_proved(installed: Path, tmp_path: Path) -> None:
    assert "own  " in mmcore(installed, "train", "--help").stdout
    flags = ["--steps", 6, "--batch-size", 64, "--width", 32, "--lr", "1e-3"]
    printed = mmcore(installed, "train", "own", *flags, "--out", tmp_path / "run").stdout
    assert "zero-shot accuracy (held-out): " in printed and "text to image: R@1" in printed
    measured = mmcore(installed, "eval", "zeroshot", tmp_path / "run").stdout
    assert measured in printed
    mmcore(installed, "export", tmp_path / "run", "--out", tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["logit_scale"].shape == (1,)
    planned = mmcore(installed, "plan", "own", "--global-batch", 64, "--gpus", 2, "--width", 32, "--json").stdout
    weights = load_file(tmp_path / "out/model.safetensors").values()
    assert json.loads(planned)["parameters"]["trained"] == sum(x.numel() for x in weights)
    proved = mmcore(installed, "prove", "own", "--json", tmp_path / "proof.json", "--out", tmp_path / "proof").stdout
    assert proved.startswith("own: zero-shot accuracy (held-out) ")
    assert (tmp_path / "proof" / "own" / "0-own" / "retrieval.png").is_file()
    [figure] = json.loads((tmp_path / "proof.json").read_text())
    assert figure["holds"] and figure["value"] > 0.85 > 0.3 > figure["control"]


def package(site: Path, name: str, init: str) -> None:
    """Writes a package with an entry point."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(init)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mmcore.systems]\n{name} = {name}\n")


def test_a_system_that_fails_is_named_and_the_others_work(tmp_path: Path) -> None:
    package(tmp_path, "torn", "import nothing_of_this_name")
    package(tmp_path, "hollow", 'RECIPES = {"hollow": "recipe:Hollow"}')
    listed = mmcore(tmp_path, "train", "--help").stdout
    assert "torn cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'" in listed
    assert "clip " in listed
    wrong = mmcore(tmp_path, "train", "hollow", code=2).stderr
    assert wrong.startswith("mmcore: 'hollow' of hollow cannot be imported: ") and wrong.count("\n") == 1
    wrong = mmcore(tmp_path, "train", "clap", code=2).stderr
    assert "got 'clap'; did you mean 'clip'" in wrong and "torn cannot be imported" in wrong


def test_a_name_that_two_packages_claim_is_an_error(tmp_path: Path) -> None:
    package(tmp_path, "other", 'RECIPES = {"clip": "recipe:Clip"}')
    wrong = mmcore(tmp_path, "train", "clip", code=2).stderr
    assert wrong == "mmcore: the name 'clip' must be of one system, but mmcore.systems.clip and other claim it\n"
