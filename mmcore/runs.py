"""Runs read back: the recipe, what it keeps, and the model it trained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.recipe import Purpose, Recipe
from mmcore.settings import from_json
from mmcore.systems import recipe_entry

FROZEN = "frozen.safetensors"
"""What a run does not train, written once into its folder."""

WeightsKey = Literal["auto", "ema", "teacher", "weight"]
TEACHER = "companion.teacher"
WEIGHTS = {"ema": "the averaged weights (EMA)", TEACHER: "the teacher's weights", "weight": "the weights"}
"""What a checkpoint's tensors are, by the key that they are stored under."""


@dataclass(frozen=True)
class SavedRun:
    """A run's newest checkpoint, or the one that was named."""

    folder: Path  # the run's
    checkpoint: Path
    key: str  # of `WEIGHTS`, under which the chosen weights are stored
    recipe: str
    saved: dict[str, Any]  # the run's config.json

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return json.loads((self.checkpoint / "state.json").read_text())["step"]


def find_run(where: Path, weights: WeightsKey = "auto") -> SavedRun:
    """Finds and verifies a checkpoint of a run's folder, or the one given; a ValueError of none, or of a damaged one.

    `weights` are "ema" for the averaged ones, "teacher" for those of a momentum teacher, "weight" for the trained ones,
    "auto" for the first where the run kept them, else as `Recipe.measured` has it.
    """
    if not where.exists():
        raise ValueError(f"RUN must be a run's folder or one of its checkpoints, got {where}, which does not exist")
    found = checkpoint.find(where)
    checkpoint.verify(found)
    folder = found.parents[1]
    saved = json.loads((folder / "config.json").read_text())
    if weights == "auto":
        has_average = any(found.glob("ema-*.safetensors"))
        weights = "ema" if has_average else recipe_entry(saved["recipe"]).load().measured
    return SavedRun(folder, found, TEACHER if weights == "teacher" else weights, saved["recipe"], saved)


def is_run(where: Path) -> bool:
    return (where / "checkpoints").is_dir() or (where / checkpoint.MANIFEST).is_file()


@dataclass(frozen=True)
class Trained:
    """A run read back: its recipe with the settings that it had, what it keeps, and the model, ready for use."""

    run: SavedRun
    recipe: Recipe
    assets: Any
    model: nn.Module


def read_run(
    where: Path, weights: WeightsKey = "auto", *, llm: Path | None = None, purpose: Purpose = "use"
) -> Trained:
    """Reads the newest checkpoint (or the one given) of a run of any recipe; `weights` as in `find_run`.

    `llm` is where its language model is now; None = where it was. A ValueError as of `find_run`, and where the
    checkpoint has no such weights, or the language model is gone or changed.
    """
    run = find_run(where, weights)
    recipe: Recipe = from_json(recipe_entry(run.recipe).load(), run.saved["settings"])
    if hasattr(recipe, "llm"):
        recipe = replace(recipe, llm=llm and str(llm))  # pyright: ignore[reportCallIssue]
    elif llm is not None:
        raise ValueError(f"--llm has no effect on a run of {run.recipe}, which has none, got {llm}")
    assets = read_assets(recipe, run.folder, run.saved, purpose)
    model = recipe.build(assets)
    load_weights(model, checkpoint.stored(run.checkpoint, run.key))
    for name, x in checkpoint.buffers(run.checkpoint).items():
        model.get_buffer(name).copy_(x)
    return Trained(run, recipe, assets, recipe.in_use(model))


def read_assets(recipe: Recipe, folder: Path, saved: Mapping[str, Any], purpose: Purpose = "train") -> Any:
    """What a run keeps in its folder; `saved` is its config.json."""
    return recipe.load_assets(folder, saved["model"], read_frozen(folder), purpose)


def read_frozen(folder: Path) -> dict[str, Tensor]:
    """The weights that a run does not train, by name."""
    return dict(checkpoint.Stored([folder / FROZEN])) if (folder / FROZEN).is_file() else {}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, is_whole: bool = True) -> None:
    """Loads weights by name into a model, one at a time, or this rank's parts of those that ZeRO-3 splits; errors as of
    `check_weights`."""
    check_weights(model, state, is_whole=is_whole)
    ours = model.state_dict(keep_vars=True)
    for name in state:
        checkpoint.write_into(ours[name], state[name])


def check_weights(model: nn.Module, state: Mapping[str, Tensor], *, is_whole: bool = True) -> None:
    """A ValueError of unknown names or other shapes, and, where `is_whole`, of a weight that learns and is missing;
    those that do not learn may have been put there by whoever built the model."""
    ours = {name: getattr(x, "ds_shape", x.shape) for name, x in model.state_dict(keep_vars=True).items()}
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name in learns if is_whole and name not in state]
    unknown = [name for name in state if name not in ours or state[name].shape != ours[name]]
    if missing or unknown:
        kind, differ = type(model).__name__, [*missing, *unknown][:3]
        raise ValueError(f"{kind}: weights must have its names and shapes, got a difference in {differ}")
