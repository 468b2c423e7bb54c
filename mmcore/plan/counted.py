"""A plan of any recipe that has no `plan.py`: its model and its loss are run on fake tensors."""

from typing import Any

import torch
import tyro
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mmcore.data import LoaderSpec
from mmcore.launch import parse
from mmcore.plan.config import MicroBatchPlan
from mmcore.plan.demand import Built
from mmcore.plan.job import Job, Piece, Setting, numbers
from mmcore.recipe import Contrastive, Recipe, Step


def counted(name: str, arguments: list[str]) -> tuple[MicroBatchPlan, Job]:
    """The plan's own flags, and what the recipe trains by its flags, counted of one and two samples.

    Raises:
        ValueError: whatever is wrong with the recipe's own settings and data.
    """
    config, rest = tyro.cli(MicroBatchPlan, args=arguments, prog=f"mmcore plan {name}", return_unknown_args=True)
    recipe: Recipe = parse(name, list(rest), f"mmcore plan {name}")
    data = recipe.open_data()
    assets = recipe.assets(data)
    specs = [LoaderSpec(size, 0, 1, recipe.run.seed) for size in (1, 2)]
    batches = [next(recipe.loader(data, assets, spec)).parts[0] for spec in specs]

    def build(_: int, num_samples: int, setting: Setting) -> Built:
        model = recipe.build(assets).train()
        batch = tree_map(_fake, batches[num_samples - 1])

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


def _fake(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x
