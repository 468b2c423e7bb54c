"""The JSON that DeepSpeed is handed: the user's own, completed by the flags."""

import json
from pathlib import Path
from typing import Any

import torch

from mmcore.train.config import EngineConfig, Precision
from mmcore.train.optim import OptimConfig

KNOWN_KEYS = frozenset(
    (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler "
        "gradient_clipping zero_optimization bf16 fp16 torch_autocast amp data_types steps_per_print "
        "wall_clock_breakdown memory_breakdown dump_state prescale_gradients gradient_predivide_factor "
        "communication_data_type seq_parallel_communication_data_type sparse_gradients flops_profiler "
        "comms_logger tensorboard wandb csv_monitor comet activation_checkpointing aio "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer checkpoint data_efficiency "
        "compression_training elasticity autotuning gradient_accumulation_dtype timers disable_allgather "
        "use_data_before_expert_parallel_ compile "
    ).split()
)


def _merge(theirs: Any, ours: Any, flag: str, file: Path | None) -> Any:
    """The one value of a setting that both a flag (None = not given) and the user's JSON may give."""
    given = theirs not in (None, "auto")
    if given and ours is not None and theirs != ours:
        raise ValueError(f"{flag} is {ours} but {file} says {theirs}: make them agree, or remove one")
    return theirs if given else ours


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        raise ValueError(f"--deepspeed must be a JSON file, got {path}, which does not exist")
    try:
        theirs = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed must be a JSON file, got {path}: {error}") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"--deepspeed must hold a JSON object, got {type(theirs).__name__} in {path}")
    unknown = sorted(set(theirs) - KNOWN_KEYS)
    if unknown:
        raise ValueError(f"{path}: DeepSpeed knows no setting {', '.join(map(repr, unknown))}")
    return theirs


def _drop_auto(value: Any) -> Any:
    """`value` without the "auto" entries that nobody filled in, so that DeepSpeed's defaults apply."""
    if isinstance(value, dict):
        return {k: _drop_auto(v) for k, v in value.items() if v != "auto"}
    return value


def _check_optimizer(theirs: dict[str, Any], optim: OptimConfig, file: Path | None) -> None:
    section = theirs.pop("optimizer", None)
    if section is not None:
        if optim.optimizer != "adamw":
            raise ValueError(f"{file}: remove 'optimizer', which is set by --optimizer {optim.optimizer}")
        if section.get("type") not in ("Adam", "AdamW"):
            raise ValueError(f"{file}: optimizer.type must be AdamW, got {section.get('type')!r}")
        ours = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2)}
        ours |= {"eps": optim.eps, "weight_decay": optim.weight_decay}
        for key, value in section.get("params", {}).items():
            value = tuple(value) if isinstance(value, list) else value
            if key in ours:
                _merge(value, ours[key], f"--{key.replace('_', '-')}", file)
            elif key not in ("torch_adam", "adam_w_mode", "bias_correction"):
                raise ValueError(f"{file}: optimizer.params.{key} is not a setting of AdamW")
    if theirs.pop("scheduler", None) is not None:
        raise ValueError(f"{file}: remove 'scheduler', the schedule is set by --lr, --warmup and the run's length")


def _resolve_precision(config: EngineConfig, theirs: dict[str, Any], stage: int) -> Precision:
    if theirs.pop("fp16", {}).get("enabled", False) is True or theirs.pop("amp", {}).get("enabled", False) is True:
        raise ValueError(f"{config.deepspeed}: fp16 is not supported, use bf16 or torch_autocast with bfloat16")
    said: Precision | None = None
    if theirs.pop("bf16", {}).get("enabled", "auto") is True:
        said = "bf16"
    autocast = theirs.pop("torch_autocast", {})
    if autocast.get("enabled", "auto") is True:
        dtype = autocast.get("dtype")
        if "float16" in str(dtype) and "bfloat16" not in str(dtype):
            raise ValueError(f"{config.deepspeed}: torch_autocast.dtype must be bfloat16, got {dtype!r}")
        said = "amp_bf16"
    default: Precision = "amp_bf16" if torch.cuda.is_available() else "fp32"
    precision = _merge(said, config.precision, "--precision", config.deepspeed) or default
    if precision == "bf16" and stage == 0:
        raise ValueError("--precision bf16 must run with --zero 1, 2 or 3 (fp32 master weights), got --zero 0")
    return precision


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
        ValueError: an unreadable file, an unknown key, a contradiction, an unsupported setting.
    """
    file = config.deepspeed
    theirs = _read_json(file)
    zero = dict(theirs.pop("zero_optimization", {}))
    stage = _merge(zero.get("stage"), config.zero, "--zero", file)
    stage = 1 if stage is None else stage
    clip = _merge(theirs.pop("gradient_clipping", None), config.grad_clip, "--grad-clip", file)
    if optim.clip_each is not None and clip not in (None, 0):
        raise ValueError(f"--clip-each {optim.clip_each} excludes a global clipping: --grad-clip must be 0, got {clip}")
    if clip is None:
        clip = 1.0 if optim.clip_each is None else 0.0
    accum = theirs.pop("gradient_accumulation_steps", "auto")
    micro = theirs.pop("train_micro_batch_size_per_gpu", "auto")
    if accum != "auto" or micro != "auto":
        said = (1 if accum == "auto" else accum) * (batch_size if micro == "auto" else micro)
        _merge(said, batch_size, "--batch-size times --accum", file)
    _merge(theirs.pop("train_batch_size", None), batch_size * world_size, "the global batch", file)
    _check_optimizer(theirs, optim, file)
    precision = _resolve_precision(config, theirs, stage)
    if "offload_optimizer" in zero:
        theirs["zero_force_ds_cpu_optimizer"] = False
    resolved = {
        "steps_per_print": 10**9,
        **_drop_auto(theirs),
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,  # the accumulation is ours: it keeps the whole contrastive batch
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**_drop_auto(zero), "stage": stage},
    }
    if precision == "bf16":
        resolved["bf16"] = {"enabled": True}
    if precision == "amp_bf16":  # no module lowers the precision of its gradients' reduction
        resolved["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return resolved, precision
