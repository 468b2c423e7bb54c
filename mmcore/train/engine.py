"""DeepSpeed, and the only file that imports it: one engine for ZeRO stages 0 to 3 on CPU and GPU."""

import json
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from mmcore.ema.zero import Shards
from mmcore.optim import AdamWEMA
from mmcore.train.optim import OptimConfig

deepspeed_logger.setLevel(logging.ERROR)  # it warns of a client optimizer, which is what is meant here

Precision = Literal["fp32", "amp_bf16", "bf16"]

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


@dataclass(frozen=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; None = what --deepspeed says, else 1."""
    precision: Precision | None = None
    """fp32; amp_bf16 (fp32 weights, bf16 autocast: the CLIP recipe); bf16 (bf16 weights, fp32 master, needs
    ZeRO 1 to 3). None = what --deepspeed says, else amp_bf16 on a GPU and fp32 on a CPU."""
    grad_clip: float | None = None
    """Largest global norm of the gradient, 0 = no clipping; None = what --deepspeed says, else 1.0."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON of your own ("auto" allowed); where it contradicts a flag, the run stops and says so."""


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
        raise ValueError(
            f"{file}: remove 'scheduler', the schedule is set by --lr, --warmup and the run's length"
        )


def _resolve_precision(config: EngineConfig, theirs: dict[str, Any], stage: int) -> Precision:
    if (
        theirs.pop("fp16", {}).get("enabled", False) is True
        or theirs.pop("amp", {}).get("enabled", False) is True
    ):
        raise ValueError(
            f"{config.deepspeed}: fp16 is not supported, use bf16 or torch_autocast with bfloat16"
        )
    said: Precision | None = None
    if theirs.pop("bf16", {}).get("enabled", "auto") is True:
        said = "bf16"
    autocast = theirs.pop("torch_autocast", {})
    if autocast.get("enabled", "auto") is True:
        if "float16" in str(autocast.get("dtype")) and "bfloat16" not in str(autocast.get("dtype")):
            raise ValueError(
                f"{config.deepspeed}: torch_autocast.dtype must be bfloat16, got {autocast['dtype']!r}"
            )
        said = "amp_bf16"
    default: Precision = "amp_bf16" if torch.cuda.is_available() else "fp32"
    precision = _merge(said, config.precision, "--precision", config.deepspeed) or default
    if precision == "bf16" and stage == 0:
        raise ValueError(
            "--precision bf16 must run with --zero 1, 2 or 3 (fp32 master weights), got --zero 0"
        )
    return precision


def deepspeed_config(
    config: EngineConfig, optim: OptimConfig, *, batch_size: int, world_size: int
) -> tuple[dict[str, Any], Precision]:
    """The JSON handed to DeepSpeed: the user's own, completed by the flags, contradictions refused.

    Args:
        config: the flags.
        optim: what a JSON `optimizer` section has to agree with.
        batch_size: samples a rank and optimizer step, accumulation included.
        world_size: data-parallel ranks.

    Returns:
        The configuration, and the precision it stands for.

    Raises:
        ValueError: an unreadable file, an unknown key, a contradiction, an unsupported setting.
    """
    theirs = _read_json(config.deepspeed)
    file = config.deepspeed
    zero = dict(theirs.pop("zero_optimization", {}))
    stage = _merge(zero.get("stage"), config.zero, "--zero", file)
    stage = 1 if stage is None else stage
    clip = _merge(theirs.pop("gradient_clipping", None), config.grad_clip, "--grad-clip", file)
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
        "gradient_clipping": 1.0 if clip is None else clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**_drop_auto(zero), "stage": stage},
    }
    if precision == "bf16":
        resolved["bf16"] = {"enabled": True}
    if precision == "amp_bf16":  # no module lowers the precision of its gradients' reduction
        resolved["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return resolved, precision


def init_distributed() -> tuple[int, int]:
    """Joins the launcher's process group, or makes one of a single rank; returns (rank, world_size)."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at the first run; gloo serves without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return dist.get_rank(), dist.get_world_size()


class Engine:
    """A model under ZeRO: forward, backward, step, and its state by full parameter names in fp32."""

    def __init__(
        self, model: nn.Module, optimizer: AdamWEMA, config: dict[str, Any], precision: Precision = "fp32"
    ) -> None:
        self.precision = precision
        self.stage: int = config["zero_optimization"]["stage"]
        self.optimizer = optimizer
        self._engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.module: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        self.shards = Shards(self._engine, self.module)
        self.params = self.shards.params

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, such as `mmcore.ema.EMA` takes."""
        return self._engine

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward; where the weights are bf16, inputs in floating point are cast to it."""
        if self.precision == "bf16":
            inputs = tuple(_cast(x) for x in inputs)
        return self._engine(*inputs, **options)

    @contextmanager
    def eval(self) -> Iterator[None]:
        """Evaluation mode without gradients, for as long as the block lasts."""
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()

    def accumulate(self) -> AbstractContextManager[None]:
        """Several `backward` calls, one gradient: reduced once, summed, not averaged over the calls."""
        return nullcontext() if self.stage == 0 else self._engine.coalesce_grad_reduction()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds the gradient of `loss`; `last` = False keeps stage 0 from reducing before the last micro-batch."""
        with self._engine.no_sync() if self.stage == 0 and not last else nullcontext():
            self._engine.backward(loss)

    def step(self, lr: float) -> float:
        """One optimizer step at learning rate `lr`; returns the global gradient norm before clipping.

        Raises:
            FloatingPointError: the gradient is not finite (the weights are left as they were by DeepSpeed, or
                are not to be saved).
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.stage == 0:  # DeepSpeed reports no norm here; the gradients are reduced already
            norm = float(
                torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])
            )
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        return norm

    def _tensors(self, key: str) -> list[Tensor]:
        """The fp32 weights (key "weight") or an optimizer state, as ZeRO lays them out."""
        flats = self.shards.flats
        return flats if key == "weight" else [self.optimizer.state[flat][key] for flat in flats]

    def gather(self, key: str, names: list[str]) -> dict[str, Tensor]:
        """Whole fp32 tensors of the weights (key "weight") or of an optimizer state, on every rank.

        A collective: every rank calls it with the same arguments. One all-reduce for all of `names`.
        """
        return self.shards.gather(names, self._tensors(key))

    def init_state(self, step: int) -> None:
        """Optimizer state as of step `step`, zero moments, to be filled by `scatter`."""
        for tensor in self.shards.flats:
            self.optimizer.init_state(tensor, step)

    def scatter(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes whole fp32 tensors into this rank's parts; the counterpart of `gather`, without communication.

        Under bf16, key "weight" sets the fp32 master; the bf16 weights are the module's, set before.
        """
        self.shards.scatter(tensors, self._tensors(key))

    def close(self) -> None:
        """Frees the engine's hooks and buffers."""
        self._engine.destroy()


def _cast(x: Any) -> Any:
    return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x
