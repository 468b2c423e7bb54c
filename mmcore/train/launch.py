"""The command line of training: flags from the configs (tyro), one sentence for a user's mistake, a clean exit."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
import tyro

from mmcore.errors import complain
from mmcore.runs import BLIP2_STAGE1, BLIP2_STAGE2, LLAVA_STAGE1, LLAVA_STAGE2
from mmcore.systems.blip2.stage1 import Blip2Stage1Config, train_blip2_stage1
from mmcore.systems.blip2.stage2 import Blip2Stage2Config, train_blip2_stage2
from mmcore.systems.clip.recipe import ClipConfig, train_clip
from mmcore.systems.llava.config import LlavaStage1Config, LlavaStage2Config
from mmcore.systems.llava.recipe import train_llava

RECIPES: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
    "clip": (ClipConfig, train_clip),
    BLIP2_STAGE1: (Blip2Stage1Config, train_blip2_stage1),
    BLIP2_STAGE2: (Blip2Stage2Config, train_blip2_stage2),
    LLAVA_STAGE1: (LlavaStage1Config, partial(train_llava, LLAVA_STAGE1)),
    LLAVA_STAGE2: (LlavaStage2Config, partial(train_llava, LLAVA_STAGE2)),
}


def main(arguments: list[str]) -> None:
    """Runs `clip ...`; exits with 2 for a user's mistake, 1 where training had to stop.

    The process ends by `os._exit` once everything is on disk: under ZeRO-3 the interpreter's own exit sometimes
    aborts after the work is done.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    config = tyro.extras.subcommand_cli_from_dict(
        {name: config for name, (config, _) in RECIPES.items()},
        args=arguments,
        prog="mmcore train",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        RECIPES[arguments[0]][1](config)
        code = 0
    except (ValueError, OSError) as error:
        code = complain(error, 2)
    except FloatingPointError as error:
        code = complain(error, 1)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and dist.is_initialized():
        dist.barrier()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
