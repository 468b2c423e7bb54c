"""A run's folder, its settings and its metrics."""

import json

import pytest

from mmcore import checkpoint
from mmcore.train.run import Metrics, RunConfig, check_settings, open_run


def write_checkpoint(run, step):
    staged = checkpoint.stage_folder(run / "checkpoints", step)
    (staged / "state.json").write_text(json.dumps({"step": step}))
    files = {"state.json": checkpoint.describe(staged / "state.json")}
    return checkpoint.commit(staged, run / "checkpoints", step, files, keep=3)


def test_an_existing_folder_is_never_overwritten(tmp_path):
    with pytest.raises(ValueError, match="must be a new folder"):
        open_run("clip", RunConfig(out=tmp_path))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="which is neither"):
        open_run("clip", RunConfig(out=tmp_path, resume="latest"))


def test_latest_is_the_newest_complete_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 10)
    checkpoint.stage_folder(tmp_path / "checkpoints", 15)  # a run killed while it saved
    assert open_run("clip", RunConfig(out=tmp_path, resume="latest")).checkpoint == newest
    assert open_run("clip", RunConfig(resume=str(newest))).folder == tmp_path


def test_latest_of_a_run_without_checkpoints_starts_from_the_beginning(tmp_path):
    start = open_run("clip", RunConfig(out=tmp_path / "new", resume="latest"))
    assert start.checkpoint is None


def test_latest_needs_a_run_and_a_checkpoint_its_own(tmp_path):
    with pytest.raises(ValueError, match="give its folder by --out"):
        open_run("clip", RunConfig(resume="latest"))
    folder = write_checkpoint(tmp_path / "a", 5)
    with pytest.raises(ValueError, match="belongs to the run"):
        open_run("clip", RunConfig(resume=str(folder), out=tmp_path / "b"))
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        open_run("clip", RunConfig(resume=str(tmp_path / "nothing")))


def test_an_older_checkpoint_is_refused_where_newer_ones_would_be_mixed_in(tmp_path):
    older, _ = write_checkpoint(tmp_path, 5), write_checkpoint(tmp_path, 10)
    with pytest.raises(ValueError, match="must be the newest checkpoint of its run"):
        open_run("clip", RunConfig(resume=str(older)))


def test_old_checkpoints_go_when_newer_are_whole(tmp_path):
    for step in range(1, 6):
        write_checkpoint(tmp_path, step)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 4, 5]


def test_settings_that_change_the_result_may_not_change_on_resume():
    saved = {"model": "tiny", "optim": {"lr": 1e-3}, "run": {"batch_size": 8}, "global batch": 16}
    check_settings(saved, saved | {"run": {"batch_size": 4}})
    with pytest.raises(ValueError, match=r"--lr must be 0.001 as in the run that is resumed, got 0.01"):
        check_settings(saved, saved | {"optim": {"lr": 1e-2}})
    with pytest.raises(ValueError, match="--global batch must be 16"):
        check_settings(saved, saved | {"global batch": 8})


def test_metrics_after_the_checkpoint_are_dropped_with_a_half_written_line(tmp_path):
    lines = [json.dumps({"step": s, "loss": float(s)}) for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    with Metrics(tmp_path, 10, 2, tensorboard=False, active=True) as metrics:
        metrics.log(3, {"loss": 30.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_files_appear_when_asked_for(tmp_path):
    with Metrics(tmp_path, 10, 0, tensorboard=True, active=True) as metrics:
        metrics.log(1, {"loss": 1.0})
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "name", ["epochs", "steps", "batch_size", "accum", "save_every", "keep", "log_every"]
)
def test_counts_below_one_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
        RunConfig(**{name: 0})  # pyright: ignore[reportArgumentType]
