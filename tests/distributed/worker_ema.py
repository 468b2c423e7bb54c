"""EMA of DeepSpeed's engine in each setting given, against the EMA of a plain module of the same weights."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from mmcore.ema import EMA, warmed_up, zero
from mmcore.nn import FeatureQueue, MomentumEncoder
from mmcore.train.config import EngineConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer
from tests.distributed.launch import serve
from tests.distributed.tiny import Averaged, averaged_batch
from tests.kernels.recorded import Operations

zero.PIECE_BYTES = 300  # so that there are several
STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) == wide] for wide in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def make_engine(run: dict[str, Any], model: nn.Module) -> Any:
    """As users make one, or as `mmcore.train` does."""
    if run.get("ours"):
        optim = OptimConfig(lr=1e-2)
        config = EngineConfig(zero=run["zero"], precision=run["precision"])
        resolved, precision = deepspeed_config(config, optim, batch_size=4, world_size=dist.get_world_size())
        return Engine(model, make_optimizer(groups(model), optim), resolved, precision).deepspeed
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": run["zero"], **run.get("zero_optimization", {})},
        "bf16": {"enabled": run["precision"] == "bf16"}, **run.get("config", {}),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def full(p: Any, stage: int) -> Tensor:
    """A whole fp32 weight, by DeepSpeed's own means (which takes others for it under round_robin_gradients)."""
    value = p if stage < 3 and p.dtype == torch.float32 else safe_get_full_fp32_param(p)
    assert value is not None
    return value.detach().clone()


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not the same to the bit."""
    same = {n for n in one.keys() & other.keys() if bits(one[n]) == bits(other[n])}
    return sorted((one.keys() | other.keys()) - same)


def bits(x: Tensor) -> tuple[torch.dtype, bytes]:
    """A tensor's own; DeepSpeed pads with what memory holds, NaN among it."""
    return x.dtype, x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def named(model: nn.Module) -> dict[str, Tensor]:
    return {n: x.detach().clone() for n, x in [*model.named_parameters(), *model.named_buffers()]}


def weights(model: nn.Module, like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if n in like}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def contents(engine: Any, ema: EMA) -> dict[str, Tensor]:
    """All that a rank holds of the weights and buffers, wherever it lies."""
    held = {f"flat {i}": x for i, x in enumerate(ema._weights.flats)} | named(engine.module)
    held |= {f"part {n}": p.ds_tensor for n, p in engine.module.named_parameters() if hasattr(p, "ds_tensor")}
    return {name: x.detach().clone() for name, x in held.items()}


def outputs(model: Any, dtype: torch.dtype, seed: int = 99) -> Tensor:
    """What a model computes, without a trace in its buffers."""
    buffers = [(x, x.clone()) for x in model.buffers()]
    with torch.no_grad():
        y = model(averaged_batch(seed).to(dtype))
    for x, before in buffers:
        x.copy_(before)
    return y


class Case:
    """An engine and its EMA, and the plain module and EMA that they are held against."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run, self.dtype = run, DTYPES[run["precision"]]
        self.engine = make_engine(run, Averaged())
        # DeepSpeed holds a frozen weight whole but under stage 3, in the model's dtype
        self.truth = Averaged().to(self.dtype).float()
        teachers = [None, None]
        if run["zero"] < 3:
            taught = DTYPES[run["teacher"]]
            teachers = [copy.deepcopy(Averaged()).to(taught), copy.deepcopy(self.truth).to(taught)]
        self.teacher, self.true_teacher = teachers
        buffers = run.get("buffers", "copy")
        self.ema = EMA(self.engine, warmed_up(0.9), buffers=buffers, teacher=self.teacher)
        self.true_ema = EMA(self.truth, warmed_up(0.9), buffers=buffers, teacher=self.true_teacher)

    def train(self, first: int, also: Callable[[], None] = lambda: None) -> None:
        for step in range(first, first + STEPS):
            loss = self.engine(averaged_batch(step, dist.get_rank()).to(self.dtype)).float().square().mean()
            self.engine.backward(loss)
            self.engine.step()
            held = dict(self.engine.module.named_parameters())
            with torch.no_grad():
                for name, x in self.truth.named_parameters():
                    if x.requires_grad:
                        x.copy_(full(held[name], self.run["zero"]))
                for x, y in zip(self.truth.buffers(), self.engine.module.buffers(), strict=True):
                    x.copy_(y)
            with Operations() as seen:
                self.ema.update()
            self.collectives = seen.collectives
            self.true_ema.update()
            also()

    def shown(self) -> dict[str, Any]:
        """Inside `swapped` the engine computes with the averages; behind it all is as it was, even after an error."""
        found: dict[str, Any] = {}
        before, computed = contents(self.engine, self.ema), outputs(self.engine, self.dtype)
        plain = copy.deepcopy(self.truth)
        self.true_ema.copy_to(plain)
        for p in plain.parameters():  # buffers DeepSpeed leaves in fp32
            p.data = p.data.to(self.dtype)
        try:
            with self.ema.swapped():
                found["computes"] = torch.equal(outputs(self.engine, self.dtype), outputs(plain, self.dtype))
                raise KeyError
        except KeyError:
            found["changed"] = differing(contents(self.engine, self.ema), before)
        found["computes as before"] = torch.equal(outputs(self.engine, self.dtype), computed)
        found["moved"] = not torch.equal(outputs(plain, self.dtype), computed)
        return found

    def check(self, folder: Path) -> dict[str, Any]:
        name, rank = self.run["id"], dist.get_rank()
        found: dict[str, Any] = {}
        self.train(0)
        found["averages"] = differing(dict(self.ema.gathered()), self.true_ema.averages)
        found["shown"] = self.shown()
        self.train(STEPS)
        averages = dict(self.ema.gathered())
        found["averages after"] = differing(averages, self.true_ema.averages)
        exported = Averaged()
        self.ema.copy_to(exported)
        found["exported"] = differing(weights(exported, averages), averages)
        found["held"] = sum(x.numel() for x in self.ema.averages.values())
        found["whole"] = sum(x.numel() for x in averages.values())
        if self.teacher is not None and self.true_teacher is not None:
            found["teacher"] = differing(named(self.teacher), named(self.true_teacher))
            dtype = DTYPES[self.run["teacher"]]
            found["teacher computes"] = torch.equal(outputs(self.teacher, dtype), outputs(self.true_teacher, dtype))
        self.ema.save(folder / f"{name}.safetensors")
        if rank == 0:
            torch.save(averages | self.true_ema.buffer_averages, folder / f"{name}.pt")
        found["num_updates"], found["collectives"] = self.ema.num_updates, self.collectives
        found["refused"] = self.refused(folder)
        return found

    def loads(self, path: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
        self.ema.load(path)
        found: dict[str, Any] = {"num_updates": self.ema.num_updates}
        loaded = dict(self.ema.gathered()) | self.ema.buffer_averages
        found["averages"] = differing(loaded, {n: expected[n].to(x.dtype) for n, x in loaded.items()})
        if self.teacher is not None:
            wanted = {n: x.to(DTYPES[self.run["teacher"]]) for n, x in self.ema.gathered()}
            found["teacher"] = differing(weights(self.teacher, wanted), wanted)
        return found

    def refused(self, folder: Path) -> dict[str, str]:
        found = {"save": refusal(lambda: self.ema.save(folder / "none" / "file"))}
        other, tower = folder / f"{self.run['id']}-other.safetensors", self.engine.module.frozen
        if dist.get_rank() == 0:
            EMA(nn.Linear(2, 2)).save(other)
        dist.barrier()
        found["load"] = refusal(lambda: self.ema.load(other))
        found["state"] = refusal(self.ema.state_dict)
        tower.weight.requires_grad_(True)
        found["unfrozen"] = refusal(self.ema.update)
        tower.weight.requires_grad_(False)
        if self.run["zero"] == 3:
            found["teacher"] = refusal(lambda: EMA(self.engine, teacher=Averaged()))
        if self.run["zero"]:
            names = "single_partition_of_fp32_groups fp32_partitioned_groups_flat fp32_groups_flat_partition".split()
            (flats,) = (getattr(self.engine.optimizer, n) for n in names if hasattr(self.engine.optimizer, n))
            kept, flats[0] = flats[0], flats[0].detach().clone()
            found["flats"] = refusal(self.ema.update)
            flats[0] = kept
        return found


def momentum() -> dict[str, Any]:
    """A momentum encoder of an engine, and a queue that the ranks share."""
    case = Case({"zero": 2, "precision": "bf16", "teacher": "bf16"})
    encoder = MomentumEncoder(case.engine, warmed_up(0.9))
    case.train(0, also=encoder.update)
    found: dict[str, Any] = {"state": refusal(encoder.state_dict)}
    theirs, ours = (dict(model.named_parameters()) for model in (case.true_teacher or case.truth, encoder.teacher))
    found["teacher"] = differing(theirs, ours)
    queue = FeatureQueue(5, 2)
    for first in (0, 2):
        rows = torch.arange(2.0)[:, None].expand(2, 2) + 10 * dist.get_rank() + first
        queue.enqueue(rows, group=dist.group.WORLD)
    found["queue"] = queue.features[:, 0].tolist()
    return found


def main(folder: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    init_distributed()
    results: dict[str, Any] = {}
    last = "first"
    for run in runs:
        case = Case(run)
        result = case.check(folder)
        expected = torch.load(folder / f"{last}.pt", weights_only=True)
        result["loaded"] = case.loads(folder / f"{last}.safetensors", expected)
        results[run["id"]], last = result, run["id"]
        case.engine.destroy()
    return results | {"momentum": momentum()}


serve(main)
