"""The JSON that DeepSpeed is handed: the user's own, completed by the flags."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmcore.errors import did_you_mean
from mmcore.ops import PRODUCTS
from mmcore.train.config import EngineConfig, Precision
from mmcore.train.optim import OptimConfig

BOOL, TEXT, TEXTS, INT = "true or false", "text", "a list of texts", "a whole number"
SIZE, COUNT, NUMBER, POSITIVE = "a whole number >= 0", "a whole number >= 1", "a number >= 0", "a number above 0"
ADAM, BFLOAT16, BETAS = "AdamW", "bfloat16", "a list of two numbers"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


_FITS: dict[str, Callable[[Any], bool]] = {
    BOOL: lambda x: isinstance(x, bool),
    TEXT: lambda x: isinstance(x, str),
    TEXTS: lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x),
    INT: _is_whole,
    SIZE: lambda x: _is_whole(x) and x >= 0,
    COUNT: lambda x: _is_whole(x) and x >= 1,
    NUMBER: lambda x: _is_number(x) and x >= 0,
    POSITIVE: lambda x: _is_number(x) and x > 0,
    ADAM: lambda x: str(x).lower() in ("adam", "adamw"),
    BFLOAT16: lambda x: x in ("bfloat16", "torch.bfloat16", "bf16"),
    BETAS: lambda x: isinstance(x, list) and len(x) == 2 and all(map(_is_number, x)),
}


def _each(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


_OFFLOAD = {"nvme_path": TEXT, "buffer_count": SIZE, "pin_memory": BOOL}
_STAGE3 = {
    **_each(SIZE, "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters"),
    **_each(SIZE, "max_reuse_distance module_granularity_threshold"),
    **_each(BOOL, "gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential"),
}
_ZERO = {
    "stage": [0, 1, 2, 3],
    **_each(SIZE, "allgather_bucket_size sub_group_size zero_hpz_partition_size"),
    "reduce_bucket_size": COUNT,
    **_each(BOOL, "contiguous_gradients reduce_scatter overlap_comm use_multi_rank_bucket_allreduce"),
    **_each(BOOL, "allgather_partitions ignore_unused_parameters round_robin_gradients parameter_alignment"),
    **_each(BOOL, "memory_efficient_linear override_module_apply log_trace_cache_warnings enable_sanity_checks"),
    **_each(BOOL, "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients"),
    **_STAGE3,
    **{f"stage3_{name}": kind for name, kind in _STAGE3.items()},
    "compute_grad_norm": [True],
    "leaf_module": _each(TEXTS, "classes names name_suffixes"),
    "offload_param": {"device": ["none", "cpu", "nvme"], **_each(SIZE, "buffer_size max_in_cpu"), **_OFFLOAD},
    "offload_optimizer": {
        "device": ["none", "cpu"],
        "ratio": [1, 1.0],
        **_each(BOOL, "pipeline_read pipeline_write fast_init"),
        **_OFFLOAD,
    },
}
_FILES = {"enabled": BOOL, **_each(TEXT, "output_path job_name")}

KEYS: dict[str, Any] = {
    # taken over: mmcore sets them, and the user's have to agree
    **_each(COUNT, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    "gradient_clipping": NUMBER,
    "optimizer": {
        "type": ADAM,
        "params": {
            **_each(NUMBER, "lr eps weight_decay"),
            "betas": BETAS,
            "torch_adam": BOOL,
            **_each([True], "adam_w_mode bias_correction"),
        },
    },
    "fp16": {
        "enabled": [False],
        **_each(BOOL, "auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        **_each(SIZE, "initial_scale_power loss_scale_window hysteresis min_loss_scale"),
        "loss_scale": NUMBER,
    },
    **_each([True], "zero_allow_untested_optimizer managed_gradient_accumulation"),
    "zero_force_ds_cpu_optimizer": [False],
    "gradient_allreduce_op": ["mean"],
    # passed on
    "zero_optimization": _ZERO,
    "bf16": _each(BOOL, "enabled check_grad_overflow"),
    "torch_autocast": {"enabled": BOOL, "dtype": BFLOAT16, "lower_precision_safe_modules": TEXTS},
    "data_types": {"grad_accum_dtype": ["bf16", "fp32"], "keep_in_fp32_modules": TEXTS},
    "steps_per_print": COUNT,
    "log_level": ["debug", "info", "warning", "error", "critical"],
    **_each(BOOL, "wall_clock_breakdown memory_breakdown dump_state disable_python_gc prescale_gradients"),
    "gradient_predivide_factor": POSITIVE,
    "communication_data_type": ["fp16", "bf16", "fp32"],
    "timers": {"throughput": _each(BOOL, "enabled synchronized")},
    "flops_profiler": {
        **_each(BOOL, "enabled detailed"),
        **_each(COUNT, "profile_step top_modules"),
        "recompute_fwd_factor": NUMBER,
        "module_depth": INT,
        "output_file": TEXT,
    },
    "comms_logger": {**_each(BOOL, "enabled verbose prof_all debug"), "prof_ops": TEXTS},
    "tensorboard": _FILES,
    "csv_monitor": _FILES,
    "wandb": {"enabled": BOOL, **_each(TEXT, "group team project")},
    "comet": {
        **_each(BOOL, "enabled online"),
        "samples_log_interval": COUNT,
        **_each(TEXT, "project workspace api_key experiment_name experiment_key mode"),
    },
    "aio": {
        **_each(COUNT, "block_size queue_depth intra_op_parallelism"),
        **_each(BOOL, "single_submit overlap_events use_gds"),
    },
}
"""What a JSON may hold: the kind of each value, the values that it may have, or the keys of a section."""

_REMOVED = "DeepSpeed 0.19 has it no more"
_IGNORED = "DeepSpeed 0.19 does nothing with it"
_PARALLEL = "ranks are data-parallel here, and ZeRO cuts the model up between them (--zero)"
_CHECKPOINTS = "checkpoints are mmcore's (--save-every, --keep, --resume), not DeepSpeed's"
_LOADER = "data are read by mmcore's loader, which gives whole batches"
_MASTER = "masters and moments are float32 here; to save memory use a higher --zero, or offload_optimizer"
_OURS = "the optimizer is one of mmcore.optim, with its average (--optimizer, --ema)"
INSTEAD: dict[str, str] = {
    "scheduler": "the schedule is set by --schedule, --lr, --warmup and the run's length",
    "amp": f"{_REMOVED}; use --precision amp_bf16",
    "elasticity": f"{_REMOVED}; a run goes on with another number of ranks by --resume",
    "curriculum_learning": f"{_REMOVED}; {_LOADER}",
    **_each(_REMOVED, "compression_training quantize_training sparse_gradients eigenvalue sparse_attention"),
    **_each(_REMOVED, "graph_harvesting progressive_layer_drop"),
    **_each(_CHECKPOINTS, "nebula datastates_ckpt checkpoint"),
    **_each(_LOADER, "data_efficiency dataloader_drop_last"),
    **_each(_PARALLEL, "tensor_parallel sequence_parallel_size data_parallel_size expert_parallel pipeline"),
    **_each(_PARALLEL, "use_data_before_expert_parallelism seq_parallel_communication_data_type"),
    **_each(_IGNORED, "disable_allgather vocabulary_size"),
    "activation_checkpointing": "it is of models that call DeepSpeed's own; say --activation-checkpointing",
    "compile": "the model runs without DeepSpeed's compiler",
    "autotuning": "mmcore plan finds the setting that fits",
    "hybrid_engine": "nothing is generated by DeepSpeed here",
    "weight_quantization": "it is of DeepSpeed's inference",
    "bfloat16": "it is 'bf16' now",
    "allgather_size": "it is 'allgather_bucket_size' in 'zero_optimization' now",
    **_each(_OURS, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer optimizer.legacy_fusion"),
    "optimizer.type": "or remove 'optimizer', which --optimizer sets",
    "optimizer.params.max_grad_norm": "say 'gradient_clipping', beside 'optimizer'",
    "managed_gradient_accumulation": "micro-batches are set by --accum",
    "gradient_allreduce_op": "losses are exact over ranks whose gradients are averaged",
    "fp16.enabled": "fp16 is not supported, use bf16 or torch_autocast with bfloat16",
    **_each(_MASTER, "bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states"),
    "bf16.immediate_grad_update": "it is of gradients in float32 under stage 1, which micro-batches exclude",
    **_each("dtypes are set by --precision", "data_types.param_dtype data_types.buffer_dtype"),
}
_INSTEAD_OF_ZERO = {
    "cpu_offload": 'say "offload_optimizer": {"device": "cpu"}',
    **_each('say "offload_param": {"device": "cpu"}', "cpu_offload_param cpu_offload_params"),
    "cpu_offload_use_pin_memory": "say 'pin_memory' in 'offload_optimizer' or 'offload_param'",
    "stage3_gather_fp16_weights_on_model_save": "say 'stage3_gather_16bit_weights_on_model_save'",
    **_each(_REMOVED, "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param"),
    "legacy_stage1": _IGNORED,
    **_each(_CHECKPOINTS, "elastic_checkpoint load_from_fp32_weights pipeline_loading_checkpoint"),
    **_each(_OURS, "zenflow save_muon_momentum_buffer_in_memory"),
    **_each(_OURS, "offload_optimizer.super_offload offload_optimizer.cpuadam_cores_perc"),
    "compute_grad_norm": "a run logs the norm, and stops where it is not finite",
    "offload_optimizer.device": "averages and checkpoints read the optimizer's state in memory",
    "offload_optimizer.ratio": "below 1 torch's AdamW trains part of the weights, without their average",
}
INSTEAD |= {f"zero_optimization.{name}": why for name, why in _INSTEAD_OF_ZERO.items()}
"""What to do in place of a setting that DeepSpeed has and a run has not, or of another value."""


def _merge(theirs: Any, ours: Any, flag: str, file: Path | None) -> Any:
    """The one value of a setting that both a flag and the user's JSON may give; None = not given."""
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(f"{flag} is {ours} but {file} says {theirs}: make them agree, or remove one")
    return ours if theirs is None else theirs


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twins = [name for name in names if names.count(name) > 1]
    if twins:
        raise ValueError(f"{twins[0]!r} is there twice")
    return dict(pairs)


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        missing = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"--deepspeed must be a JSON file, got {path}, which {missing}")
    try:
        theirs = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        hint = "JSON has no comments, and no comma behind the last entry"
        raise ValueError(f"--deepspeed must be a JSON file, got {path}: {error}; {hint}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--deepspeed must be a JSON file, got {path}: {error}") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"--deepspeed must hold a JSON object, got {type(theirs).__name__} in {path}")
    return _checked(theirs, KEYS, "", path)


def _checked(theirs: Mapping[str, Any], known: Mapping[str, Any], where: str, file: Path) -> dict[str, Any]:
    """What is given of a section, `where` in the file: without "auto" and null, so that flags or DeepSpeed's defaults
    apply, and without what is switched off and not known here; a ValueError names the first mistake."""
    given: dict[str, Any] = {}
    for key, value in theirs.items():
        name, kind = where + key, known.get(key)
        why = INSTEAD.get(name)
        if kind is None:
            is_off = value is False or (isinstance(value, dict) and value.get("enabled") in (False, "auto"))
            if why and not is_off:
                raise ValueError(f"{file}: remove {name!r}: {why}")
            if not why:
                refused = (x.removeprefix(where) for x in INSTEAD if x.startswith(where))
                near = did_you_mean(key, {*known, *refused})
                raise ValueError(f"{file}: DeepSpeed knows no setting {name!r}{near}")
        elif isinstance(kind, dict):
            if not isinstance(value, dict):
                raise ValueError(
                    f'{file}: {name} must be an object such as {{"{next(iter(kind))}": ...}}, got {value!r}'
                )
            given[key] = _checked(value, kind, f"{name}.", file)
        elif value not in ("auto", None):
            listed = isinstance(kind, list)
            fits = any(type(x) is type(value) and x == value for x in kind) if listed else _FITS[kind](value)
            if not fits:
                wanted = " or ".join(map(json.dumps, kind)) if listed else kind
                raise ValueError(f"{file}: {name} must be {wanted}, got {value!r}{f': {why}' if why else ''}")
            given[key] = value
    return given


def _check_optimizer(section: dict[str, Any] | None, optim: OptimConfig, file: Path | None) -> None:
    if section is None:
        return
    if optim.optimizer != "adamw":
        raise ValueError(f"{file}: remove 'optimizer', which is set by --optimizer {optim.optimizer}")
    if "type" not in section:
        raise ValueError(f"{file}: optimizer.type must be AdamW, got nothing")
    params = section.get("params", {})
    for key in params.keys() & {"lr", "eps", "weight_decay"}:
        _merge(params[key], getattr(optim, key), f"--{key.replace('_', '-')}", file)
    if "betas" in params:
        _merge(tuple(params["betas"]), (optim.beta1, optim.beta2), "(--beta1, --beta2)", file)


def auto_precision() -> tuple[Precision, str]:
    """What `--precision auto` is on this machine, and why."""
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("amp_bf16", "the GPU multiplies bf16") if has else ("fp32", "the GPU does not multiply bf16")
    way, why, ms = PRODUCTS["bfloat16"]
    if way == "widened":
        return "fp32", f"this processor multiplies bf16 no faster than fp32 ({why})"
    faster = f" {ms['widened'] / ms[way]:.1f} times as fast as fp32" if way in ms else ""
    return "amp_bf16", f"this processor multiplies bf16{faster} by {way} ({why})"


def _resolve_precision(config: EngineConfig, theirs: Mapping[str, Any], stage: int) -> Precision:
    file = config.deepspeed
    sections: dict[Precision, str] = {"bf16": "bf16", "amp_bf16": "torch_autocast"}
    said = {precision: theirs.get(section, {}).get("enabled") for precision, section in sections.items()}
    if all(said.values()):
        raise ValueError(f"{file}: bf16 and torch_autocast must not both be enabled: weights are bf16 or float32")
    wanted = None if config.precision == "auto" else config.precision
    if wanted in said and said[wanted] is False:
        off = f"{sections[wanted]}.enabled is false in {file}"
        raise ValueError(f"--precision is {wanted} but {off}: make them agree, or remove one")
    is_on = next((precision for precision, enabled in said.items() if enabled), None)
    default = "amp_bf16" if torch.cuda.is_available() and said["amp_bf16"] is not False else "fp32"
    if config.precision == "auto" and said["amp_bf16"] is not False:
        default = auto_precision()[0]
    precision: Precision = _merge(is_on, wanted, "--precision", file) or default
    if precision == "bf16" and stage == 0:
        raise ValueError("--precision bf16 must run with --zero 1, 2 or 3 (fp32 master weights), got --zero 0")
    dtype = theirs.get("data_types", {}).get("grad_accum_dtype")
    if (precision == "bf16" and stage == 1 and dtype == "fp32") or (precision != "bf16" and dtype == "bf16"):
        how = f"--precision {precision} and --zero {stage}"
        raise ValueError(f"{file}: data_types.grad_accum_dtype must not be {dtype!r} with {how}: remove it")
    return precision


def _check_offload(zero: Mapping[str, Any], stage: int, file: Path | None) -> None:
    """DeepSpeed reads past it in other stages."""
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        device = zero.get(name, {}).get("device", "none")
        if device != "none" and stage < least:
            stages = " or ".join(map(str, range(least, 4)))
            raise ValueError(f"{file}: zero_optimization.{name} must be with stage {stages}, got stage {stage}")


def _reports(theirs: Mapping[str, Any]) -> bool:
    """Whether the user asks for what DeepSpeed prints by its log."""
    plain = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state")
    sections = (theirs.get(name, {}) for name in ("flops_profiler", "comms_logger"))
    return any(map(theirs.get, plain)) or any(section.get("enabled") for section in sections)


def deepspeed_config(
    config: EngineConfig, optim: OptimConfig, *, batch_size: int, world_size: int
) -> tuple[dict[str, Any], Precision]:
    """The JSON handed to DeepSpeed, the user's own completed by the flags, and the precision that it stands for.

    Args:
        config: the flags.
        optim: what a JSON `optimizer` section has to agree with.
        batch_size: samples a rank and optimizer step, accumulation included.
        world_size: data-parallel ranks.

    Raises:
        ValueError: an unreadable file, an unknown key, a value of another kind, a contradiction, what is not supported.
    """
    file = config.deepspeed
    theirs = _read_json(file)
    zero = theirs.pop("zero_optimization", {})
    stage = _merge(zero.get("stage"), config.zero, "--zero", file)
    stage = 1 if stage is None else stage
    clip = _merge(theirs.pop("gradient_clipping", None), config.grad_clip, "--grad-clip", file)
    if optim.clip_each is not None and clip not in (None, 0):
        raise ValueError(f"--clip-each {optim.clip_each} excludes a global clipping: --grad-clip must be 0, got {clip}")
    if clip is None:
        clip = 1.0 if optim.clip_each is None else 0.0
    accum = theirs.pop("gradient_accumulation_steps", None)
    micro = theirs.pop("train_micro_batch_size_per_gpu", None)
    if accum is not None or micro is not None:
        said = (1 if accum is None else accum) * (batch_size if micro is None else micro)
        _merge(said, batch_size, "--batch-size times --accum", file)
    _merge(theirs.pop("train_batch_size", None), batch_size * world_size, "the global batch", file)
    _check_optimizer(theirs.pop("optimizer", None), optim, file)
    precision = _resolve_precision(config, theirs, stage)
    _check_offload(zero, stage, file)
    theirs.pop("fp16", None)
    bf16, autocast = theirs.pop("bf16", {}), theirs.pop("torch_autocast", {})
    if "offload_optimizer" in zero:
        theirs["zero_force_ds_cpu_optimizer"] = False
    resolved = {
        "steps_per_print": 10**9,
        # a device is waited for in each step otherwise
        "timers": {"throughput": {"enabled": False}},
        **({"log_level": "info"} if _reports(theirs) else {}),
        **theirs,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,  # the accumulation is ours: it keeps the whole contrastive batch
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**zero, "stage": stage},
    }
    if precision == "bf16":
        resolved["bf16"] = {**bf16, "enabled": True}
    if precision == "amp_bf16":  # no module lowers the precision of its gradients' reduction
        own = {"enabled": True, "dtype": "bfloat16"}
        resolved["torch_autocast"] = {"lower_precision_safe_modules": [], **autocast, **own}
    return resolved, precision
