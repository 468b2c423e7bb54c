"""A user's own package adds a system: installed, trained, measured, exported, planned, proved without an edit here."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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


# processes of their own, since this one has looked for systems already; what trains ends one
PROGRAM = """
import json, sys
from mmcore.cli import main

for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        print(end.code, file=sys.stderr)
    print(END, end="", flush=True)
"""
END = "\x1e"


def mmcore(site: Path, *commands: Sequence[object]) -> tuple[list[str], list[str]]:
    """What each of the commands prints, and lines of errors, with exit codes below them."""
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(site), env["PYTHONPATH"]])
    words = json.dumps([[str(word) for word in command] for command in commands])
    program = PROGRAM.replace("END", repr(END), 1)
    started = [sys.executable, "-c", program, words]
    done = subprocess.run(started, cwd=site, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout.removesuffix(END).split(END), done.stderr.splitlines()


def test_a_package_of_ones_own_trains_is_measured_exported_planned_and_proved(installed: Path, tmp_path: Path) -> None:
    flags = ["--steps", 6, "--batch-size", 64, "--width", 32, "--lr", "1e-3"]
    train = ["train", "own", *flags, "--out", tmp_path / "run"]
    (listed, printed), _ = mmcore(installed, ["train", "--help"], train)
    assert "own  " in listed
    assert "zero-shot accuracy (held-out): " in printed and "text to image: R@1" in printed
    evaluate, export = ["eval", "zeroshot", tmp_path / "run"], ["export", tmp_path / "run", "--out", tmp_path / "out"]
    plan = ["plan", "own", "--global-batch", 64, "--gpus", 2, "--width", 32, "--json"]
    prove = ["prove", "own", "--json", tmp_path / "proof.json", "--out", tmp_path / "proof"]
    (measured, _, planned, proved), _ = mmcore(installed, evaluate, export, plan, prove)
    assert measured in printed
    weights = load_file(tmp_path / "out/model.safetensors")
    assert weights["logit_scale"].shape == (1,)
    assert json.loads(planned)["parameters"]["trained"] == sum(x.numel() for x in weights.values())
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
    (listed, *_), (hollow, code, clap, again) = mmcore(tmp_path, *(["train", x] for x in ("--help", "hollow", "clap")))
    assert "torn cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'" in listed
    assert "clip " in listed
    assert hollow.startswith("mmcore: 'hollow' of hollow cannot be imported: ")
    assert "got 'clap'; did you mean 'clip'" in clap and "torn cannot be imported" in clap
    assert code == again == "2"


def test_a_name_that_two_packages_claim_is_an_error(tmp_path: Path) -> None:
    package(tmp_path, "other", 'RECIPES = {"clip": "recipe:Clip"}')
    assert mmcore(tmp_path, ["train", "clip"])[1] == [
        "mmcore: the name 'clip' must be of one system, but mmcore.systems.clip and other claim it", "2"
    ]  # fmt: skip
