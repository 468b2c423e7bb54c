"""Trains BLIP2LM under the engine for a few steps in each setting given, on a batch whose last rank has no pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmcore import checkpoint
from mmcore.data.text.prompts import Prompted
from mmcore.systems.blip2.steps import stage2_backward
from mmcore.train.engine import Engine, EngineConfig, deepspeed_config, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups
from mmcore.train.state import save_state
from tests.distributed import blip2_lm, tiny
from tests.distributed.launch import finish

OPTIM = OptimConfig(lr=1e-2, ema=0.99)


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    rank, world_size = init_distributed()
    results = {}
    for run in arguments["runs"]:
        model: Any = blip2_lm.model(getattr(torch, run.get("language", "float32")))
        optimizer = make_optimizer(param_groups(model, OPTIM.weight_decay), OPTIM)
        config = EngineConfig(zero=run["zero"], precision=run.get("precision", "fp32"))
        size = blip2_lm.B // world_size
        resolved, precision = deepspeed_config(config, OPTIM, batch_size=size, world_size=world_size)
        engine = Engine(model, optimizer, resolved, precision)
        losses = []
        for step in range(run["steps"]):
            images, texts, has_image = blip2_lm.batch(step)
            tokens, num_prompt, num_text = (tiny.share(x, rank, world_size) for x in texts[:3])
            mine = Prompted(tokens, num_prompt, num_text, None)
            images, has_image = (tiny.share(x, rank, world_size) for x in (images, has_image))
            losses.append(float(stage2_backward(engine, images, mine, has_image)["loss"]))
            engine.step(OPTIM.lr)
        images, texts, _ = blip2_lm.batch(0)
        with engine.eval():
            options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
            ids = engine("generate", images, texts.tokens[:, :2], torch.full((blip2_lm.B,), 2), **options)
        names = list(engine.params)
        state = {key: engine.gather(key, names) for key in ("weight", "ema")}
        saved = save_state(engine, folder / run["id"], run["steps"], {}, {}, keep=1)
        if rank == 0:
            torch.save(state, folder / f"{run['id']}.pt")
        results[run["id"]] = {
            "losses": losses,
            "ids": ids.tolist(),
            "trained": sum(p.numel() for flats in optimizer.param_groups for p in flats["params"]),
            "saved": sorted(
                {name for key in ("weight", "ema") for name, _ in checkpoint.tensors(saved, key)}
            ),
            "language": sorted({str(p.dtype) for p in model.language_model.parameters()}),
        }
        engine.close()
    dist.barrier()
    finish(folder, results)


main()
