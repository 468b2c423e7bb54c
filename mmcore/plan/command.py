"""`mmcore plan RECIPE`: what a run will take, before a GPU is asked for."""

import json

import tyro
from rich.console import Console

from mmcore.plan.config import PlanConfig
from mmcore.plan.counted import counted
from mmcore.plan.hardware import GPUS
from mmcore.plan.report import as_json, plan, show
from mmcore.systems import entries


def main(arguments: list[str]) -> None:
    """Runs `clip ...`.

    Raises:
        ValueError: an unknown recipe, model or shape, or options that no run could have.
    """
    plans, recipes = entries("PLANS"), entries("RECIPES")
    known = [*plans, *(name for name in recipes if name not in plans)]
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print("usage: mmcore plan RECIPE [options], of " + ", ".join(known))
        return
    if name is None or name not in known:
        raise ValueError(f"mmcore plan must be followed by one of {', '.join(known)}, got {name or 'nothing'}")
    if name in plans:
        config: PlanConfig = tyro.cli(plans[name].load(), args=arguments[1:], prog=f"mmcore plan {name}")
        job = config.job()
    else:
        config, job = counted(name, arguments[1:])
    found = plan(job, config.setting(), GPUS[config.gpu])
    if config.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(found, Console(highlight=False, soft_wrap=True))
