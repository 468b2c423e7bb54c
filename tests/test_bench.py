"""What bench says of peers that are not there, of cases that do not fit, and of time that is over."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import case, peers
from bench.case import Case, refusal, time_case
from bench.gpu.lines import read
from bench.ops import contrastive
from bench.peers import PEERS, Peer, facts, load, missing

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A peer that runs anywhere, whose one file does not exist yet."""
    monkeypatch.setattr(peers, "PEERS", {"made_up": Peer("made_up_peer", "made-up", "nothing", needs_gpu=False)})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_up_peer", raising=False)
    peers._found.cache_clear()
    return tmp_path / "made_up_peer.py"


@pytest.mark.parametrize(("source", "reason"), [
    (None, "is not installed"),
    ("raise OSError('x.so: cannot open\\nand more')", "cannot be imported: x.so: cannot open"),
    ("answer = 42", None),
])  # fmt: skip
def test_a_peer_is_loaded_or_it_is_said_why_not(peer: Path, source: str | None, reason: str | None) -> None:
    if source is not None:
        peer.write_text(source)
    assert missing("made_up") == reason
    if reason is None:
        assert load("made_up").answer == 42 and facts() == {"made_up": "of an unknown version"}
        sys.modules.pop("made_up_peer")
    else:
        with pytest.raises(ImportError, match=f"made_up {reason}"):
            load("made_up")


class Unused:
    """A benchmark that is not to be run."""

    group, params, enabled = "", {"shape": {"B": 8}, "contender": "eager"}, True

    def pedantic(self, *_: Any, **__: Any) -> None:
        raise AssertionError("timed")


def timed(contender: str, error: BaseException, mode: str = "step", floor_s: float = 1.0) -> None:
    """Times a case that ends with the error."""

    def call() -> None:
        raise error

    time_case(Unused(), CPU, Case("op B8", contender, call, (), mode, floor_s))


def test_a_case_that_does_not_fit_is_kept_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "OUT_OF_MEMORY", [])
    with pytest.raises(pytest.skip.Exception, match="more memory"):
        timed("eager", torch.OutOfMemoryError("CUDA out of memory"))
    kept = {"group": "op B8 step", "extra_info": {"contender": "eager"}, "params": {"shape": {"B": 8}}}
    assert [kept] == case.OUT_OF_MEMORY


@pytest.mark.parametrize("mode", ["forward", "backward", "both", "step"])
def test_a_peer_that_serves_no_such_case_is_skipped_with_its_words_and_ours_never(mode: str) -> None:
    name, error = next(iter(PEERS)), ValueError("D must be 64\nor so")
    with pytest.raises(pytest.skip.Exception, match=f"{name} does not serve this: ValueError: D must be 64$"):
        timed(name, error, mode, 1e-6)
    with pytest.raises(ValueError, match="D must be 64"):
        timed("mmkernels", error, mode, 1e-6)
    assert refusal(lambda: None) is None


def test_a_claim_is_asserted_where_it_is_asked_for() -> None:
    name = "bench/test_llava.py::test_the_mix_is_as_large_as_published"
    assert "a claim, which --claims asserts" in pytest_in(ROOT, name)
    assert "1 passed" in pytest_in(ROOT, name, "--claims")


@pytest.mark.parametrize(("op", "said"), [("ewc", "test_op[ewc_penalty-many-mmkernels]"), ("made_up", "got made_up")])
def test_one_module_of_the_ops_is_taken_by_its_name(op: str, said: str) -> None:
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "--collect-only", "-q", f"--op={op}"]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert said in done.stdout + done.stderr and "contrastive_loss-" not in done.stdout


def test_a_form_written_here_is_not_skipped_for_the_library_of_its_name() -> None:
    (bench,) = contrastive.BENCHES
    assert "open_clip" in bench.axes["contender"] and "open_clip" in PEERS and "open_clip" not in bench.peers


def pytest_in(folder: Path, *options: str, source: str | None = None) -> str:
    """What a run of pytest prints, of a file of this source where it is given."""
    if source is not None:
        (folder / "test_it.py").write_text(source)
        options = ("--rootdir=.", "test_it.py", *options)
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *options]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_whose_time_is_over_ends_by_itself_and_writes_what_it_has(tmp_path: Path) -> None:
    source = (
        "from bench.gpu import running\n"
        "def test_first(benchmark):\n"
        "    benchmark(int)\n"
        "    running._BEGAN -= 100\n"
        "def test_second(benchmark): benchmark(int)\n"
    )
    options = "-p bench.gpu.running --time-limit 100 --benchmark-json=out.json --lines=out.jsonl".split()
    assert "not begun: 100 s are over" in pytest_in(tmp_path, *options, source=source)
    assert [b["name"] for b in json.loads((tmp_path / "out.json").read_text())["benchmarks"]] == ["test_first"]
    first, second = read(tmp_path / "out.jsonl")
    assert first["test"].endswith("test_first") and first["outcome"] == "passed" and first["median_s"] > 0
    assert second["outcome"] == "skipped" and second["why"] == "Skipped: not begun: 100 s are over"
    ordered = "def test_first(): pass\ndef test_second(): pass\n"
    said = pytest_in(tmp_path, "-p", "bench.gpu.running", "--first=SECOND", "-vv", source=ordered)
    assert said.index("test_second") < said.index("test_first")
