"""A run's folder, its settings and its metrics; from flags and a user's JSON to DeepSpeed's configuration."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmcore import checkpoint
from mmcore.data import StepBatch
from mmcore.settings import as_yaml, check_resumed, from_json, to_json, with_yaml
from mmcore.systems.clip.recipe import Clip
from mmcore.systems.llava.recipe import LlavaStage2
from mmcore.train import deepspeed_json, trainer
from mmcore.train.config import EngineConfig, RunConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.optim import OptimConfig, lr_schedule, weight_decay_schedule
from mmcore.train.run import Metrics, open_run
from tests.refusals import refuses


def write_checkpoint(run, step):
    staged = checkpoint.stage_folder(run / "checkpoints", step)
    (staged / "state.json").write_text(json.dumps({"step": step}))
    files = {"state.json": checkpoint.describe(staged / "state.json")}
    return checkpoint.commit(staged, run / "checkpoints", step, files, keep=3)


def test_latest_is_the_newest_complete_checkpoint_or_the_beginning(tmp_path):
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 10)
    checkpoint.stage_folder(tmp_path / "checkpoints", 15)  # a run killed while it saved
    assert open_run("clip", RunConfig(out=tmp_path, resume="latest")).checkpoint == newest
    assert open_run("clip", RunConfig(resume=str(newest))).folder == tmp_path
    assert open_run("clip", RunConfig(out=tmp_path / "new", resume="latest")).checkpoint is None


@pytest.mark.parametrize(("out", "resume", "message"), [
    ("run", None, "must be a new folder"),
    ("thesis", "latest", "which is neither"),
    (None, "latest", "give its folder by --out"),
    ("other", "run/checkpoints/step-00000010", "belongs to the run"),
    (None, "run/nothing", "not a complete checkpoint"),
    (None, "run/checkpoints/step-00000005", "must be the newest checkpoint of its run"),  # newer would be mixed in
])  # fmt: skip
def test_a_folder_that_a_run_may_not_be_in_is_refused(tmp_path, monkeypatch, out, resume, message):
    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        write_checkpoint(Path("run"), step)
    Path("thesis").mkdir()
    Path("thesis/thesis.txt").write_text("mine")
    refuses(message, open_run, "clip", RunConfig(out=out and Path(out), resume=resume))


def test_old_checkpoints_go_when_newer_are_whole(tmp_path):
    for step in range(1, 6):
        write_checkpoint(tmp_path, step)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 4, 5]


def test_settings_that_change_the_result_may_not_change_on_resume():
    clip = Clip(optim=OptimConfig(lr=1e-3))
    saved = to_json(clip)
    check_resumed(saved, replace(clip, run=RunConfig(batch_size=4, out=Path("x"))))
    with pytest.raises(ValueError, match=r"--lr must be 0.001 as in the run that is resumed, got 0.01"):
        check_resumed(saved, replace(clip, optim=OptimConfig(lr=1e-2)))
    del saved["optim"]["ema"]  # of a run from before it was a setting
    check_resumed(saved, clip)
    with pytest.raises(ValueError, match=r"--ema must be None as in the run that is resumed, got 0\.5"):
        check_resumed(saved, replace(clip, optim=OptimConfig(lr=1e-3, ema=0.5)))


def test_the_loop_hands_the_engine_the_rate_and_decay_of_each_step(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "seed_step", lambda *_: 0)
    optim, calls = OptimConfig(schedule="linear", weight_decay_end=0.4), []
    engine: Any = SimpleNamespace(step=lambda *arguments, **options: (calls.append((*arguments, options)), 0.5)[1])
    recipe: Any = SimpleNamespace(
        run=RunConfig(), optim=optim, backward=lambda *_: {"loss": torch.tensor(1.0)}, after_step=lambda *_: None
    )
    unused: Any = None
    loop = trainer.Loop(tmp_path, recipe, engine, unused, unused, 10, {}, dict)
    logged = [loop._step(step, StepBatch((), 0, [])) for step in (0, 5)]
    expected = [(lr_schedule(optim, 10)(s), weight_decay_schedule(optim, 10)(s), s) for s in (0, 5)]
    assert calls == [(lr, {"weight_decay": decay, "step": step}) for lr, decay, step in expected]
    assert logged == [{"loss": torch.tensor(1.0), "gradient norm": 0.5}] * 2


def test_settings_come_back_from_json_with_their_types():
    stage2 = LlavaStage2(start=Path("a"), lora=3, optim=OptimConfig(ema=0.5), run=RunConfig(out=Path("b")))
    assert from_json(LlavaStage2, json.loads(json.dumps(to_json(stage2)))) == stage2


def test_a_yaml_file_gives_settings_by_the_names_of_flags_and_is_what_a_run_keeps(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("batch-size: 8\nlr: 1e-3\nfrom: runs/a\nlora: 4\n")
    found = with_yaml(LlavaStage2(), file)
    assert (found.run.batch_size, found.optim.lr, found.start, found.lora) == (8, 1e-3, Path("runs/a"), 4)
    file.write_text(as_yaml(found))
    assert with_yaml(LlavaStage2(), file) == found


@pytest.mark.parametrize(("text", "message"), [
    ("batchsize: 8", "there is no setting 'batchsize'; the nearest is 'batch-size'"),
    ("lr: fast", "lr must be float, got 'fast'"), ("zero: 7", "zero must be one of 0, 1, 2, 3 or nothing, got 7"),
    ("batch-size: true", "batch-size must be int, got True"), ("- 3", "must hold names and values, got list"),
    ("a: [", "must be a YAML file"),
])  # fmt: skip
def test_a_mistake_in_a_yaml_file_is_one_sentence(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    refuses(message, with_yaml, Clip(), file)


def test_metrics_after_the_checkpoint_are_dropped_with_a_half_written_line_and_go_to_tensorboard_too(tmp_path):
    lines = [json.dumps({"step": s, "loss": float(s)}) for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    with Metrics(tmp_path, 10, 2, tensorboard=True, active=True) as metrics:
        metrics.log(3, {"loss": 30.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_counts_below_one_are_refused_by_name():
    for name in ("epochs", "steps", "batch_size", "accum", "save_every", "keep", "log_every"):
        refuses(f"--{name.replace('_', '-')} must be at least 1, got 0", RunConfig, **{name: 0})


SGD = OptimConfig(optimizer="sgd")


def resolve(tmp_path, theirs=None, optim=None, **flags):
    if theirs is not None:
        path = tmp_path / "ds.json"
        path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
        flags["deepspeed"] = path
    return deepspeed_config(EngineConfig(**flags), optim or OptimConfig(), batch_size=8, world_size=2)


def test_flags_alone_give_zero_1_with_clipping_written_out(tmp_path):
    config, precision = resolve(tmp_path)
    assert config["zero_optimization"] == {"stage": 1} and config["gradient_clipping"] == 1.0
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["timers"] == {"throughput": {"enabled": False}}  # which waits for the device in each step
    assert precision == ("amp_bf16" if torch.cuda.is_available() else "fp32")
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert resolve(tmp_path, offloaded)[0]["zero_force_ds_cpu_optimizer"] is False  # not DeepSpeed's own Adam


@pytest.mark.parametrize(("way", "expected"), [("widened", "fp32"), ("avx512", "amp_bf16")])
def test_an_automatic_precision_is_what_the_processor_multiplies_faster(
    tmp_path, monkeypatch, way: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(deepspeed_json.PRODUCTS, "bfloat16", (way, "measured now", {"widened": 0.6, "avx512": 0.1}))
    assert resolve(tmp_path, precision="auto")[1] == expected
    assert ("6.0 times" in deepspeed_json.auto_precision()[1]) == (way == "avx512")
    # a file's word is one
    assert resolve(tmp_path, {"torch_autocast": {"enabled": True}}, precision="auto")[1] == "amp_bf16"
    assert resolve(tmp_path, {"torch_autocast": {"enabled": False}}, precision="auto")[1] == "fp32"


def test_users_json_is_kept_and_completed(tmp_path):
    """With all that LLaVA's users have in theirs."""
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    known = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9}
    known |= {"stage3_max_live_parameters": 1e9, "stage3_gather_16bit_weights_on_model_save": True}
    theirs = {"zero_optimization": known | dict.fromkeys(sizes, "auto"), "bf16": {"enabled": "auto"}}
    theirs |= {"fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}}
    counts = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    theirs |= {**dict.fromkeys(counts, "auto"), "gradient_clipping": 0.5, "wall_clock_breakdown": True}
    theirs |= {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98]}}}
    config, precision = resolve(tmp_path, theirs, precision="fp32")
    assert config["zero_optimization"] == known and config["gradient_clipping"] == 0.5
    assert config["wall_clock_breakdown"] is True and precision == "fp32" and "optimizer" not in config
    assert config["train_micro_batch_size_per_gpu"] == 8 and "auto" not in json.dumps(config)


def test_json_decides_what_no_flag_says(tmp_path):
    config, precision = resolve(tmp_path, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    assert (config["zero_optimization"]["stage"], precision) == (2, "bf16") and config["bf16"] == {"enabled": True}
    config, precision = resolve(tmp_path, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    assert precision == "amp_bf16" and config["torch_autocast"]["lower_precision_safe_modules"] == []


@pytest.mark.parametrize(("theirs", "flags", "message"), [
    ({"zero_optimization": {"stage": 3}}, {"zero": 1}, "--zero is 1 but .*ds.json says 3"),
    ({"gradient_clipping": 0.5}, {"grad_clip": 1.0}, "--grad-clip is 1.0 but .* says 0.5"),
    ({"bf16": {"enabled": True}}, {"precision": "fp32"}, "--precision is fp32 but .* says bf16"),
    ({"train_batch_size": 8}, {}, "the global batch is 16 but .* says 8"),
    ({"train_micro_batch_size_per_gpu": 4}, {}, "--batch-size times --accum is 8 but .* says 4"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, {}, "--lr is 0.0005 but .* says 0.1"),
    ({"optimizer": {"type": "Lion", "params": {}}}, {}, "optimizer.type must be AdamW, got 'Lion'"),
    ({"scheduler": {"type": "WarmupLR"}}, {}, "remove 'scheduler'"),
    ({"fp16": {"enabled": True}}, {}, "fp16 is not supported"),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, {}, "must be bfloat16, got 'float16'"),
    ({"zero_optimisation": {"stage": 3}}, {}, "knows no setting 'zero_optimisation'"),
    ("{", {}, "must be a JSON file"),
    ("[]", {}, "must hold a JSON object, got list"),
    ({}, {"precision": "bf16", "zero": 0}, "must run with --zero 1, 2 or 3"),
    (None, {"deepspeed": Path("none.json")}, r"none\.json, which does not exist"),
    ({"optimizer": {"type": "AdamW"}}, {"optim": SGD}, "remove 'optimizer', which is set by --optimizer sgd"),
])  # fmt: skip
def test_contradictions_and_mistakes_are_named(tmp_path, theirs, flags, message):
    refuses(message, resolve, tmp_path, theirs, **flags)


def test_a_clipping_of_each_gradient_takes_the_place_of_the_global_one(tmp_path):
    def clipping(**flags):
        return resolve(tmp_path, optim=OptimConfig(clip_each=3.0), **flags)[0]["gradient_clipping"]

    assert clipping() == clipping(grad_clip=0.0) == 0.0
    refuses(r"--clip-each 3.0 excludes .* --grad-clip must be 0, got 1.0", clipping, grad_clip=1.0)
