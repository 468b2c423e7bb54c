"""A DeepSpeed JSON of the user's: every setting that DeepSpeed has is passed, taken over or refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from deepspeed.runtime import config as theirs
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.data_pipeline import constants as data_constants
from pydantic import BaseModel

from mmcore.train.config import EngineConfig
from mmcore.train.deepspeed_json import INSTEAD, KEYS, deepspeed_config
from mmcore.train.engine import check_config
from mmcore.train.optim import OptimConfig
from tests.refusals import refuses

Settings = dict[str, Any]
REQUIRED = {"train_micro_batch_size_per_gpu": 8}
TAKEN = ("train_", "gradient_acc", "gradient_clipping", "optimizer", "fp16", "managed", "gradient_allreduce_op")
SAMPLES = {"true or false": True, "text": "x", "a list of texts": ["a.B"], "a list of two numbers": [0.9, 0.98]}
SAMPLES |= {"a whole number": 3, "a whole number >= 0": 3, "a whole number >= 1": 3, "AdamW": "AdamW"}
SAMPLES |= {"a number >= 0": 3.5, "a number above 0": 3.5, "bfloat16": "bfloat16"}


def resolve(file: Path, settings: Any, **flags: Any) -> Settings:
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return deepspeed_config(EngineConfig(deepspeed=file, **flags), OptimConfig(), batch_size=8, world_size=1)[0]


def nested(name: str, value: Any) -> Settings:
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


class Asked(dict):
    """A section that remembers what it is asked for, by full names."""

    def __init__(self, entries: Settings, names: set[str], where: str = "") -> None:
        super().__init__({k: Asked(v, names, f"{where}{k}.") if isinstance(v, dict) else v for k, v in entries.items()})
        self.names, self.where = names, where

    def __copy__(self) -> "Asked":
        return Asked(self, self.names, self.where)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(self.where + key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.names.add(self.where + key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.names.add(f"{self.where}{key}")
        return super().__contains__(key)


def fields(model: type[BaseModel], where: str) -> Iterator[str]:
    """Names of a section's settings and their aliases, deprecated ones too, with those of sections in it."""
    for name, field in model.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        models = [t for t in inner if issubclass(t, BaseModel)]
        for key in {name, field.alias or name}:
            yield where + key
            for of in models:
                yield from fields(of, f"{where}{key}.")


def deepspeeds_settings() -> set[str]:
    """Every setting that DeepSpeed's own classes have, by full name."""
    names: set[str] = set()
    sections = [name for name, kind in KEYS.items() if isinstance(kind, dict)]
    DeepSpeedConfig(Asked({**{name: {} for name in sections}, **REQUIRED, "zero_optimization": {"stage": 1}}, names))
    parsed = DeepSpeedConfig(REQUIRED)
    models = {"zero_optimization": parsed.zero_config, "bf16": parsed.bfloat16_config, "fp16": parsed.float16_config}
    models |= {name: getattr(parsed.monitor_config, name) for name in ("tensorboard", "wandb", "csv_monitor", "comet")}
    models |= {"timers.throughput": parsed.timers_config, "compile": parsed.compile_config}
    models |= {"tensor_parallel": parsed.tensor_parallel_config, "hybrid_engine": parsed.hybrid_engine}
    for section, model in models.items():
        names |= set(fields(type(model), f"{section}."))
    names |= set(fields(theirs.DeepSpeedCommsConfig({"comms_logger": {}}).comms_logger.__class__, "comms_logger."))
    removed = theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS, theirs._REMOVED_ZERO_CONFIG_KEYS
    return names | set(removed[0]) | {f"zero_optimization.{name}" for name in removed[1]} | {"data_parallel_size"}


def kind_of(name: str) -> Any:
    """What KEYS says of a setting; None = nothing."""
    kind: Any = KEYS
    for key in name.split("."):
        kind = kind.get(key) if isinstance(kind, dict) else None
    return kind


def flat(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """What an object of DeepSpeed's holds, by name."""
    inner = value.model_dump() if isinstance(value, BaseModel) else value if isinstance(value, dict) else None
    if inner is None and type(value).__module__.startswith("deepspeed.") and hasattr(value, "__dict__"):
        inner = {k: x for k, x in vars(value).items() if k != "_param_dict"}
    if inner is None:
        yield where, repr(value)
        return
    for key, x in inner.items():
        yield from flat(x, f"{where}.{key}")


NAMES = sorted(deepspeeds_settings())
KNOWN = [name for name in NAMES if kind_of(name) is not None and not isinstance(kind_of(name), dict)]


def test_the_walk_sees_deepspeeds_settings_of_every_form():
    assert len(NAMES) > 150
    found = "steps_per_print zero_optimization.cpu_offload zero_optimization.stage3_max_live_parameters aio.block_size"
    assert set(found.split()) | {"flops_profiler.profile_step", "expert_parallel", "bf16.bf16_optimizer_states"} < set(
        NAMES
    )
    assert {"zero_optimization.offload_param.buffer_size", "zero_optimization.zenflow.topk_ratio"} < set(NAMES)
    assert data_constants.DATA_EFFICIENCY in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_of_deepspeed_is_known_or_refused_by_name(name, tmp_path):
    if kind_of(name) is not None:
        return
    refused = next(top for top in (name, *map(".".join, _above(name))) if top in INSTEAD)
    refuses(
        f"remove '{refused}': {INSTEAD[refused][:20].replace('(', '.')}", resolve, tmp_path / "ds.json", nested(name, 3)
    )


def _above(name: str) -> Iterator[list[str]]:
    parts = name.split(".")
    return (parts[:i] for i in range(len(parts) - 1, 0, -1))


@pytest.mark.parametrize("name", KNOWN)
def test_a_setting_that_is_passed_reaches_deepspeeds_own_configuration(name, tmp_path):
    kind = kind_of(name)
    values = kind if isinstance(kind, list) else [SAMPLES[kind], False] if kind == "true or false" else [SAMPLES[kind]]
    if name.startswith(TAKEN):
        for value in values:
            own = {"optimizer": {"type": "AdamW"}} if name.startswith("optimizer.params") else {}
            try:
                resolved = resolve(tmp_path / "ds.json", _joined(own, nested(name, value)))
            except ValueError as error:
                assert "make them agree" in str(error)
            else:
                assert name.split(".")[0] not in {"optimizer", "fp16"} & resolved.keys()
        return
    section = {"bf16": {"bf16": {"enabled": True}}, "torch_autocast": {"torch_autocast": {"enabled": True}}}
    beside = section.get(name.split(".")[0], {})
    if name.startswith(("data_types", "zero_optimization.offload_param")):
        beside = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    before = dict(flat(DeepSpeedConfig(resolve(tmp_path / "ds.json", beside))))
    reached = []
    for value in values:
        resolved = resolve(tmp_path / "ds.json", _joined(beside, nested(name, value)))
        if name == "aio.use_gds" and value:  # on a CPU
            refuses("GDS currently only supported for CUDA", check_config, resolved)
            return
        check_config(resolved)
        reached.append(dict(flat(DeepSpeedConfig(resolved))) != before)
    is_only_value = name.endswith(
        ("compute_grad_norm", "zero_allow_untested_optimizer", ".ratio", ".enabled", ".dtype")
    )
    assert any(reached) or is_only_value, "DeepSpeed reads nothing of it"


def _joined(a: Settings, b: Settings) -> Settings:
    return a | {k: _joined(a[k], v) if isinstance(a.get(k), dict) else v for k, v in b.items()}


@pytest.mark.parametrize(("settings", "message"), [
    ({"fp16": True}, r"fp16 must be an object such as \{\"enabled\": \.\.\.\}, got True"),
    ({"zero_optimization": 2}, r"zero_optimization must be an object such as \{\"stage\": \.\.\.\}, got 2"),
    ({"zero_optimization": True}, "zero_optimization must be an object"),
    ({"zero_optimization": None}, "zero_optimization must be an object .* got None"),
    ({"zero_optimization": [{"stage": 2}]}, "zero_optimization must be an object"),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer must be an object"),
    ({"bf16": "auto"}, "bf16 must be an object .* got 'auto'"),
    ({"optimizer": "Adam"}, "optimizer must be an object"),
    ({"optimizer": {"type": "AdamW", "params": [1e-3]}}, "optimizer.params must be an object"),
    ({"optimizer": {"params": {}}}, "optimizer.type must be AdamW, got nothing"),
    ({"optimizer": {"type": None}}, "optimizer.type must be AdamW, got nothing"),
    ({"scheduler": None}, "remove 'scheduler'"),
    ({"flops_profiler": 3}, "flops_profiler must be an object"),
    ({"timers": {"throughput": False}}, "timers.throughput must be an object"),
    ({"tensorboard": True}, "tensorboard must be an object"),
    ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage must be 0 or 1 or 2 or 3, got '2'"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0 or 1 or 2 or 3, got 4"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be"),
    ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "reduce_bucket_size must be a whole number >= 1, got '5e8'"),
    ({"zero_optimization": {"sub_group_size": -1}}, "sub_group_size must be a whole number >= 0, got -1"),
    ({"zero_optimization": {"overlap_comm": "true"}}, "overlap_comm must be true or false, got 'true'"),
    ({"bf16": {"enabled": 1}}, "bf16.enabled must be true or false, got 1"),
    ({"gradient_clipping": True}, "gradient_clipping must be a number >= 0, got True"),
    ({"steps_per_print": 0}, "steps_per_print must be a whole number >= 1, got 0"),
    ('{"gradient_clipping": NaN}', "gradient_clipping must be a number >= 0, got nan"),
    ('{"zero_optimization": {"sub_group_size": 1e999}}', "sub_group_size must be a whole number >= 0, got inf"),
    ({"train_batch_size": "8"}, "train_batch_size must be a whole number >= 1, got '8'"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "betas must be a list of two numbers"),
    ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, "adam_w_mode must be true, got False"),
    ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "must not both be enabled"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "must not be 'bf16' with --precision fp32 and --zero 1: remove it"),
    ({"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}}, "must not be 'fp32' with --precision"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "must be with stage 3, got stage 1"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "stage 1 or 2 or 3, got stage 0"),
    ({"zero_optimization": {"stage3_prefetch_bucket_size": 15099494.4}}, "must be a whole number >= 0, got 15099494.4"),
    ({"zero_optimization": {"cpu_offload": True}}, r"remove 'zero_optimization.cpu_offload': say"),
    ({"zero_optimization": {"cpu_offload_params": True}}, "say \"offload_param\""),
    ({"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}}, "say 'stage3_gather_16bit_weights"),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device must be \"none\" or \"cpu\", got"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio must be .* torch's AdamW"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "remove 'bf16.bf16_master_weights_and_grads'"),
    ({"bf16": {"enabled": True, "loss_scale_window": 1000}}, "knows no setting 'bf16.loss_scale_window'"),
    ({"tensor_parallel": {"autotp_size": 4}}, "remove 'tensor_parallel': ranks are data-parallel here"),
    ({"sequence_parallel_size": 2}, "remove 'sequence_parallel_size': ranks are data-parallel here"),
    ({"gradient_acumulation_steps": 2}, "'gradient_acumulation_steps'; did you mean 'gradient_accumulation_steps'"),
    ({"zero_optimization": {"overlap_com": True}}, "'zero_optimization.overlap_com'; did you mean 'overlap_comm'"),
    ({"flops_profiler": {"top_module": 1}}, "did you mean 'top_modules'"),
    ({"tensor_paralel": {"autotp_size": 2}}, "did you mean 'tensor_parallel'"),
    ({"zero_optimization": {"offload_optimizer": True}}, "offload_optimizer must be an object"),
    ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', "must be a JSON file, .*'bf16' is there twice"),
    ('{"bf16": {"enabled": true} // of ours\n}', "must be a JSON file, .* JSON has no comments"),
    ('{"bf16": {"enabled": true},}', "no comma behind the last entry"),
    ("3", "must hold a JSON object, got int"), ("", "must be a JSON file"), ("null", "got NoneType"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_setting(settings, message, tmp_path):
    refuses(message, resolve, tmp_path / "ds.json", settings, precision=None)


def test_a_file_in_another_encoding_or_of_another_kind_is_read_or_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_bytes(b'\xef\xbb\xbf{"gradient_clipping": 0.5}')  # Windows' mark of UTF-8
    options: Any = {"batch_size": 8, "world_size": 1}
    assert deepspeed_config(EngineConfig(deepspeed=file), OptimConfig(), **options)[0]["gradient_clipping"] == 0.5
    file.write_bytes('{"gradient_clipping": 0.5}'.encode("utf-16"))
    refuses("must be a JSON file", deepspeed_config, EngineConfig(deepspeed=file), OptimConfig(), **options)
    refuses("which is a folder", deepspeed_config, EngineConfig(deepspeed=tmp_path), OptimConfig(), **options)


def test_auto_null_and_what_is_switched_off_say_nothing(tmp_path):
    """As transformers' integration has it, in any place of a value."""
    plain = resolve(tmp_path / "ds.json", {})
    off = {"amp": {"enabled": False}, "data_efficiency": {"enabled": False}, "fp16": {"enabled": "auto"}}
    off |= {"train_batch_size": "auto", "gradient_clipping": None, "communication_data_type": None}
    off |= {"zero_optimization": {"stage": "auto", "sub_group_size": "auto", "cpu_offload": False}}
    off |= {"optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}}
    assert resolve(tmp_path / "ds.json", off) == plain


@pytest.mark.parametrize(("section", "precision"), [("bf16", "bf16"), ("torch_autocast", "amp_bf16")])
def test_a_precision_that_the_file_switches_off_is_not_asked_for(section, precision, tmp_path, monkeypatch):
    file, off = tmp_path / "ds.json", {section: {"enabled": False}}
    refuses(f"--precision is {precision} but {section}.enabled is false", resolve, file, off, precision=precision)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # where it would be the default
    assert ("torch_autocast" in resolve(file, off)) == (section == "bf16")


def test_settings_that_exclude_each_other_are_a_sentence_of_deepspeeds_own(tmp_path):
    both = {
        "zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 3},
        "timers": {"throughput": {"enabled": True}},
    }
    check_config(resolve(tmp_path / "ds.json", both))
    refuses(
        "DeepSpeed refuses the configuration: .*stage", check_config, REQUIRED | {"zero_optimization": {"stage": 9}}
    )


def test_what_deepspeed_prints_is_heard_where_it_is_asked_for(tmp_path):
    file = tmp_path / "ds.json"
    assert "log_level" not in resolve(file, {"wall_clock_breakdown": False, "flops_profiler": {"enabled": False}})
    for asked in ({"wall_clock_breakdown": True}, {"comms_logger": {"enabled": True}}, {"steps_per_print": 5}):
        assert resolve(file, asked)["log_level"] == "info"
    assert resolve(file, {"dump_state": True, "log_level": "error"})["log_level"] == "error"
