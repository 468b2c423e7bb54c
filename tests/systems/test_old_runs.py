"""Runs of before a recipe was a class still resume, evaluate and export: two of them, stopped after two of four steps,
and what the code that made them said of the other two."""

import json
import tarfile
from pathlib import Path

import pytest

from mmcore import checkpoint
from tests.systems.clip.test_cli import run

HERE = Path(__file__).with_name("old_runs")
FLAGS = "--steps 4 --batch-size 32 --log-every 1 --save-every 2 --keep 9 --eval-every 4 --lr 1e-3 --ema 0.9".split()
RESUMED = {"clip": [], "llava-stage2": ["--max-answer", 4, "--lora", 2]}
LOSSES = {
    "clip": {3: 3.642374038696289, 4: 3.5208590030670166},
    "llava-stage2": {3: 5.498922824859619, 4: 5.515588760375977},
}
SAID = {
    "clip": ("zeroshot", "zero-shot accuracy (held-out): 11.4 %\nzero-shot top-5 accuracy (held-out): 52.6 %\n"),
    "llava-stage2": ("vqa", "answer accuracy (held-out): 0.0 % (majority 24.4 %)\n"),
}
EXPORTED = {"clip": "CLIPModel", "llava-stage2": "LlavaForConditionalGeneration"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_of_before_goes_on_as_it_would_have_is_measured_alike_and_exports(name: str, tmp_path: Path) -> None:
    with tarfile.open(HERE / f"{name}.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / name
    run("train", name, "--out", folder, "--resume", "latest", *FLAGS, *RESUMED[name])
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = {r["step"]: r["loss"] for r in records if r["step"] > 2}
    # products of another processor differ in the last digits
    assert found == pytest.approx(LOSSES[name], rel=1e-5)
    assert checkpoint.steps(folder / "checkpoints") == [2, 4]
    task, said = SAID[name]
    assert run("eval", task, folder).stdout.startswith(said)
    run("export", folder, "--out", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [EXPORTED[name]]
