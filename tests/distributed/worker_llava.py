"""Trains Llava under the engine for a few steps in each setting given, on a batch whose last rank has no images."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmcore.systems.llava.recipe import llava_backward
from mmcore.train.engine import Engine, EngineConfig, deepspeed_config, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups
from tests.distributed import llava
from tests.distributed.launch import finish

OPTIM = OptimConfig(lr=1e-2)


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    rank, world_size = init_distributed()
    results = {}
    for run in arguments["runs"]:
        is_lora = run.get("lora", False)
        model = llava.model(run["trainable"], tied=run["tied"], lora=is_lora)
        model.set_activation_checkpointing(is_lora)
        shape = model.config
        optimizer = make_optimizer(param_groups(model, OPTIM.weight_decay, run.get("rates", {})), OPTIM)
        config = EngineConfig(zero=run["zero"], precision="fp32")
        resolved, precision = deepspeed_config(
            config, OPTIM, batch_size=llava.B // world_size, world_size=world_size
        )
        engine = Engine(model, optimizer, resolved, precision)
        losses = []
        for step in range(run["steps"]):
            parts = llava.parts(step, range(rank, rank + 1), shape, run.get("accum", 1))
            losses.append(float(llava_backward(engine, parts)))
            engine.step(OPTIM.lr)
        tokens, _, images, sizes = llava.batch(0, range(rank, rank + 1), shape)
        with engine.eval():
            options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            num_text = torch.full((len(tokens),), tokens.shape[1])
            ids = engine("generate", tokens, num_text, images, sizes, **options)
        state = engine.gather("weight", list(engine.params))
        if rank == 0:
            torch.save(state, folder / f"{run['id']}.pt")
        results[run["id"]] = {"losses": losses, "ids": ids.tolist()}
        engine.close()
    dist.barrier()
    finish(folder, results)


main()
