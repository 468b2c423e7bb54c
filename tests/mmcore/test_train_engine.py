"""From flags and a user's JSON to DeepSpeed's configuration."""

import json

import pytest
import torch

from mmcore.train.engine import EngineConfig, deepspeed_config
from mmcore.train.optim import OptimConfig


def resolve(tmp_path, theirs=None, **flags):
    if theirs is not None:
        path = tmp_path / "ds.json"
        path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
        flags["deepspeed"] = path
    return deepspeed_config(EngineConfig(**flags), OptimConfig(), batch_size=8, world_size=2)


def test_flags_alone_give_zero_1_with_clipping_written_out(tmp_path):
    config, precision = resolve(tmp_path)
    assert config["zero_optimization"] == {"stage": 1}
    assert config["gradient_clipping"] == 1.0
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert precision == ("amp_bf16" if torch.cuda.is_available() else "fp32")


def test_users_json_is_kept_and_completed(tmp_path):
    theirs = {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "gradient_clipping": 0.5,
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "wall_clock_breakdown": True,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98]}},
    }
    config, precision = resolve(tmp_path, theirs, precision="fp32")
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert config["gradient_clipping"] == 0.5
    assert config["wall_clock_breakdown"] is True
    assert precision == "fp32"
    assert "optimizer" not in config
    assert "auto" not in json.dumps(config)


def test_json_decides_what_no_flag_says(tmp_path):
    config, precision = resolve(tmp_path, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    assert (config["zero_optimization"]["stage"], precision) == (2, "bf16")
    assert config["bf16"] == {"enabled": True}
    config, precision = resolve(tmp_path, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    assert precision == "amp_bf16"
    assert config["torch_autocast"]["lower_precision_safe_modules"] == []


def test_offload_does_not_ask_for_deepspeeds_own_adam(tmp_path):
    config, _ = resolve(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("theirs", "flags", "message"),
    [
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
    ],
)
def test_contradictions_and_mistakes_are_named(tmp_path, theirs, flags, message):
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path, theirs, **flags)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json, which does not exist"):
        resolve(tmp_path, deepspeed=tmp_path / "none.json")
