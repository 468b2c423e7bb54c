"""Runs the real engine as one rank of many, the others being fake: what it sends in a step and holds between steps.

Prints a line of JSON a case: {"case", "sent": {...}, "held"}.
"""

import gc
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from mmcore.labels import IMAGE_TOKEN
from mmcore.parts.vit import VisionConfig
from mmcore.plan.job import Job, Setting
from mmcore.plan.pieces import language_model
from mmcore.plan.zero import BUCKET
from mmcore.recipe import Step
from mmcore.systems.clip.model import CLIP
from mmcore.systems.clip.plan import clip_job
from mmcore.systems.clip.shapes import clip_config
from mmcore.systems.llava.inputs import ChatPart
from mmcore.systems.llava.model import Llava, LlavaConfig
from mmcore.systems.llava.plan import llava_job_of
from mmcore.systems.llava.recipe import LlavaStage1
from mmcore.train.config import EngineConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups

MICRO, LENGTH = 2, 24
VISION = VisionConfig(image_size=16, patch_size=8, width=128, num_layers=2, num_heads=2, mlp_dim=512)
LANGUAGE = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2
)


class Case(NamedTuple):
    """What is trained, and how."""

    recipe: Literal["clip", "llava-stage1", "llava-stage2"]
    zero: int
    precision: Any
    accum: int = 1
    activation_checkpointing: bool = False

    def job(self) -> Job:
        if self.recipe == "clip":
            return clip_job("tiny")
        return llava_job_of("", LlavaConfig(VISION), LANGUAGE, self._trainable(), LENGTH)

    def setting(self, ranks: int) -> Setting:
        options = self.precision, self.accum, self.activation_checkpointing
        return Setting(MICRO * self.accum * ranks, ranks, self.zero, *options, ema=True)

    def model(self) -> Any:
        if self.recipe == "clip":
            model: Any = CLIP(clip_config("tiny"))
        else:
            low = self.recipe == "llava-stage1" and self.precision != "fp32"
            language = language_model(LANGUAGE, torch.bfloat16 if low else torch.float32)
            model = Llava(LlavaConfig(VISION), language, trainable=self._trainable()).train()
        model.set_activation_checkpointing(self.activation_checkpointing)
        return model

    def _trainable(self) -> Literal["projector", "language"]:
        return "projector" if self.recipe == "llava-stage1" else "language"


CASES = (
    Case("clip", 0, "fp32"), Case("clip", 1, "fp32"), Case("clip", 1, "bf16"), Case("clip", 2, "amp_bf16", 4),
    Case("clip", 3, "bf16"), Case("clip", 3, "fp32", 4), Case("llava-stage2", 0, "fp32", 2),
    Case("llava-stage2", 2, "fp32", 2), Case("llava-stage2", 3, "fp32", 2), Case("llava-stage2", 3, "bf16", 1, True),
    Case("llava-stage1", 3, "bf16", 3, True),
)  # fmt: skip


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends in rings, by collective: of a gather all parts but one, of an all-reduce twice as
    much."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            whole = max(x.nbytes for x in tensors)
            once = whole * (self.ranks - 1) / self.ranks
            self.sent[name] += {"allreduce_": 2, "broadcast_": 0}.get(name, 1) * once
        return func(*args, **(kwargs or {}))


def held() -> dict[int, int]:
    """Bytes of all tensors that there are, by storage, but for ZeRO's bucket."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return {place: size for place, size in found.items() if size not in (2 * BUCKET, 4 * BUCKET)}


def _clip_backward(engine: Engine, accum: int) -> Callable[[], object]:
    images, tokens = torch.randn(MICRO, 3, 16, 16), torch.randint(1, 1000, (MICRO, 32))

    def forward() -> Tensor:
        a, b, scale = engine(images, tokens)
        return ((a * b).sum() * scale).sum()

    def backward() -> None:
        if accum == 1:
            engine.backward(forward())
            return
        with torch.no_grad():
            for _ in range(accum):
                forward()
        with engine.accumulate():
            for i in range(accum):
                engine.backward(forward(), last=i == accum - 1)

    return backward


def _llava_backward(engine: Engine, accum: int) -> Callable[[], object]:
    tokens = torch.randint(1, 1000, (MICRO, LENGTH))
    tokens[:, 1 : 1 + VISION.num_patches] = IMAGE_TOKEN
    part = ChatPart(tokens, tokens.clamp(min=0), torch.randn(MICRO, 3, 16, 16), None, None)
    return lambda: LlavaStage1().backward(engine, [part] * accum, Step(0, 1, 0))


def measure(case: Case, ranks: int) -> dict[str, Any]:
    before = set(held())
    optim = OptimConfig(ema=0.99)
    config = EngineConfig(zero=case.zero, precision=case.precision)  # pyright: ignore[reportArgumentType]
    resolved, precision = deepspeed_config(config, optim, batch_size=MICRO * case.accum, world_size=ranks)
    model = case.model()
    engine = Engine(model, make_optimizer(param_groups(model, optim), optim), resolved, precision)
    del model
    backward = (_clip_backward if case.recipe == "clip" else _llava_backward)(engine, case.accum)

    def step() -> None:
        backward()
        engine.step(1e-3)

    step()
    with Traffic(ranks) as traffic:
        step()
    now = held()
    of_engine = sum(size for place, size in now.items() if place not in before)
    sent = dict(traffic.sent)
    engine.close()
    return {"case": case, "sent": sent, "held": of_engine}


def main(ranks: int) -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    init_distributed()
    for case in CASES:
        print(json.dumps(measure(case, ranks)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
