"""DeepSpeed, and the only file that imports it: one engine for ZeRO stages 0 to 3 on CPU and GPU."""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedConfigError
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from mmcore.data.loader import map_tensors
from mmcore.ema.zero import Shards
from mmcore.ops import require
from mmcore.optim import EMAOptimizer
from mmcore.train.config import Precision

deepspeed_logger.setLevel(logging.ERROR)  # it warns of a client optimizer, which is what is meant here


def init_distributed() -> tuple[int, int]:
    """Joins the launcher's process group, or makes one of a single rank; returns (rank, world_size)."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at the first run; gloo serves without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return dist.get_rank(), dist.get_world_size()


def partitioner(config: dict[str, Any]) -> Callable[[nn.Module, Callable[[Tensor], torch.dtype]], None] | None:
    """Under ZeRO-3, what splits rank 0's weights of a part of a model among ranks, each in the dtype that a function
    says, so that no rank ever holds more than its share and one weight. Collective; None under other stages."""
    if config["zero_optimization"]["stage"] < 3:
        return None

    def partition(part: nn.Module, dtype_of: Callable[[Tensor], torch.dtype]) -> None:
        largest, rooms, convert = max((p.numel() for p in part.parameters()), default=0), {}, None
        for p in part.parameters():
            dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else dtype_of(p)
            # one room for all: memory that is freed between the shares would not be used again
            if dtype not in rooms:
                rooms[dtype] = torch.empty(largest, dtype=dtype)
            room = rooms[dtype][: p.numel()].view(p.shape)
            p.data = room.copy_(p.data) if dist.get_rank() == 0 else room
            if convert is None:
                deepspeed.zero.Init(module=nn.ParameterList([p]), config_dict_or_path=config)
                convert = p.convert_to_zero_parameters  # pyright: ignore[reportAttributeAccessIssue]
            else:
                convert(param_list=[p])

    return partition


def check_config(config: dict[str, Any]) -> None:
    """Raise a ValueError where DeepSpeed itself refuses a configuration, such as for values that exclude each other."""
    with _in_a_sentence():
        deepspeed.DeepSpeedConfig(config)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """What DeepSpeed says of its configuration in errors of many kinds, as a ValueError."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, NotImplementedError, ImportError, DeepSpeedConfigError) as error:
        found = [f"{'.'.join(x['loc'])}: {x['msg']}" for x in getattr(error, "errors", list)()]  # pydantic's
        said = "; ".join(found) or " ".join(str(error).split())
        raise ValueError(f"--deepspeed: DeepSpeed refuses the configuration: {said}") from error


class Engine:
    """A model under ZeRO: forward, backward, step, and its state by full parameter names in fp32."""

    def __init__(
        self, model: nn.Module, optimizer: EMAOptimizer, config: dict[str, Any], precision: Precision = "fp32"
    ) -> None:
        self.precision = precision
        self.stage: int = config["zero_optimization"]["stage"]
        self.optimizer = optimizer
        self.num_steps = 0
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            self._complete(model)
        with _in_a_sentence():
            self._engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.module: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        self.shards = Shards(self._engine, self.module)
        self.params = self.shards.params
        optimizer.bind(self.shards, [group_of[self.params[names[0]]] for names in self.shards.members])
        for p in self.params.values():
            until = optimizer.param_groups[group_of[p]]["frozen_until"]
            if until > 0:
                p.register_hook(partial(self._unless_frozen, until))

    def _complete(self, model: nn.Module) -> None:
        """What DeepSpeed does to a model but not to one of which it has split a part: casts weights, moves buffers."""
        accelerator: Any = deepspeed.accelerator.get_accelerator()
        device = accelerator.device_name(int(os.environ["LOCAL_RANK"]))
        for p in model.parameters():
            if self.precision == "bf16" and p.is_floating_point() and not hasattr(p, "ds_id"):
                p.data = p.data.to(torch.bfloat16)
        for x in model.buffers():
            x.data = x.data.to(device)

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, such as `mmcore.ema.EMA` takes."""
        return self._engine

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward; where the weights are bf16, inputs in floating point are cast to it."""
        if self.precision == "bf16":
            inputs = tuple(_cast(x) for x in inputs)
        return self._engine(*inputs, **options)

    def place(self, batch: Any) -> Any:
        """A batch with its tensors on the engine's device; of tuples, lists and dicts."""
        return map_tensors(lambda x: x.to(self.device, non_blocking=True), batch)

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

    def _unless_frozen(self, until: int, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad) if self.num_steps < until else grad

    def step(self, lr: float, *, weight_decay: float | None = None, step: int | None = None) -> Tensor | float:
        """One optimizer step; returns the global gradient norm before clipping, of one element, without waiting for it.

        Where it is not finite DeepSpeed left the weights as they were, or they are not to be saved.

        Args:
            lr: learning rate, of groups with `fixed_lr` the optimizer's own in its place; times a group's `lr_scale`.
            weight_decay: of the groups with `scheduled_decay`; None = as it was.
            step: the number of this step, from 0; None = the one that is due. Groups are left as they are at the steps
                before their `frozen_until`: their gradient is zero from the backward on.
        """
        is_due = step in (None, self.num_steps)
        require("Engine.step", is_due, "step must be {}, the one that is due, got {}", self.num_steps, step)
        for group in self.optimizer.param_groups:
            group["lr"] = (self.optimizer.defaults["lr"] if group["fixed_lr"] else lr) * group["lr_scale"]
            if weight_decay is not None and group["scheduled_decay"]:
                group["weight_decay"] = weight_decay
            group["frozen"] = self.num_steps < group["frozen_until"]
        self.num_steps += 1
        if self.stage > 0:
            self._engine.step()
            return self._engine.get_global_grad_norm()
        # DeepSpeed reports no norm here; the gradients are reduced already
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])
        self._engine.step()
        return norm

    def _tensors(self, key: str) -> Mapping[int, Tensor]:
        """The fp32 weights (key "weight") or an optimizer state, as ZeRO lays them out, where there is one."""
        flats = self.shards.flats
        if key == "weight":
            return dict(enumerate(flats))
        for flat in flats:
            if not self.optimizer.state[flat]:  # of a group that was frozen so far
                self.optimizer.init_state(flat, 0)
        states = ((i, self.optimizer.state[flat]) for i, flat in enumerate(flats))
        return {i: state[key] for i, state in states if key in state}

    def gather(self, key: str, names: list[str]) -> dict[str, Tensor]:
        """Whole fp32 tensors of the weights (key "weight") or of an optimizer state, on every rank, of those among
        `names` that have it (Muon's matrices have no second moment).

        A collective: every rank calls it with the same arguments. One all-reduce for all of `names`.
        """
        tensors = self._tensors(key)
        held = {name for i in tensors for name in self.shards.members[i]}
        return self.shards.gather([name for name in names if name in held], tensors)

    def init_state(self, step: int) -> None:
        """Optimizer state as of step `step`, zero moments, to be filled by `scatter`."""
        self.num_steps = step
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
