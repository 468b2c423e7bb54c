"""`mmcore plan RECIPE`: what a run will take, before a GPU is asked for."""

import json
from dataclasses import replace
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from mmcore.data import LoaderSpec
from mmcore.errors import did_you_mean
from mmcore.launch import parse
from mmcore.ops import require
from mmcore.plan.demand import Built
from mmcore.plan.hardware import GPUS
from mmcore.plan.job import Job, MicroBatchPlan, Piece, PlanConfig, Setting, numbers
from mmcore.plan.report import as_json, plan, show
from mmcore.recipe import Contrastive, Recipe, Step
from mmcore.systems import entries


def main(arguments: list[str]) -> None:
    """Runs `clip ...`; a ValueError of an unknown recipe, model or shape, or options that no run could have."""
    plans, recipes = entries("PLANS"), entries("RECIPES")
    known = [*plans, *(name for name in recipes if name not in plans)]
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print("usage: mmcore plan RECIPE [options], of " + ", ".join(known))
        return
    if name is None or name not in known:
        hint = did_you_mean(name or "", known, 3)
        raise ValueError(f"mmcore plan must be followed by one of {', '.join(known)}, got {name or 'nothing'}{hint}")
    if name in plans:
        config: PlanConfig = tyro.cli(plans[name].load(), args=arguments[1:], prog=f"mmcore plan {name}")
        job = config.job()
    else:
        config, job = _counted(name, arguments[1:])
    found = plan(job, config.setting(), GPUS[config.gpu])
    if config.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(found, Console(highlight=False, soft_wrap=True))


def _counted(name: str, arguments: list[str]) -> tuple[MicroBatchPlan, Job]:
    """The plan's own flags, and what a recipe without a `plan.py` trains by its flags: its model and its loss are run
    on fake tensors, of one and two samples."""
    config, rest = tyro.cli(MicroBatchPlan, args=arguments, prog=f"mmcore plan {name}", return_unknown_args=True)
    # counted whole, a model does not tell what one layer computes again
    require(
        "plan", not config.activation_checkpointing, "--activation-checkpointing must be left out for {}, got it", name
    )
    recipe: Recipe = parse(name, list(rest), f"mmcore plan {name}")
    data = recipe.open_data()
    assets = recipe.assets(data)
    specs = [LoaderSpec(size, 0, 1, recipe.run.seed) for size in (1, 2)]
    batches = [next(recipe.loader(data, assets, spec)).parts[0] for spec in specs]
    assets = replace(assets, frozen={})  # values that fake tensors have not

    def fake(x: Any) -> Any:
        return torch.empty(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x

    def build(_: int, num_samples: int, setting: Setting) -> Built:
        model = recipe.build(replace(assets, frozen=tree_map(fake, dict(assets.frozen)))).train()
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            norm.eval()  # which in training refuses one sample
        batch = tree_map(fake, batches[num_samples - 1])

        def forward() -> list[Tensor]:
            if isinstance(recipe, Contrastive):
                return list(recipe.features(model, batch))
            return [recipe.loss(model, batch, Step(0, 1, 0))["loss"]]

        return Built(model.parameters(), forward)

    with torch.device("meta"):
        learned, frozen, small = numbers(recipe.build(assets))
    batch_bytes = sum(x.nbytes for x in tree_leaves(batches[0]) if isinstance(x, Tensor))
    piece = Piece("model", 1, build, (1, 1))
    return config, Job(name, (piece,), learned, batch_bytes, frozen=frozen, small=small)
