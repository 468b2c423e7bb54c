"""What a model is measured by: each task asks a recipe for a capability, not for its name.

A task is a module here of its name, with `follow(subject)`, the numbers that a run watches, `report(subject, options)`,
what `mmcore eval` and the end of a run print and write, and `Options`, the flags of the former, None of the latter.
Where there is nothing to measure, a run goes without, and `mmcore eval` says so.
"""

import importlib
from pathlib import Path
from typing import Any

from mmcore.errors import did_you_mean
from mmcore.report.pictures import plot_curves
from mmcore.runs import WEIGHTS, Trained, read_run
from mmcore.tasks.subject import Subject, default_device

TASKS = {
    "zeroshot": "embeds",
    "retrieval": "embeds or matches",
    "crosslingual": "embeds",
    "alignment": "aligns",
    "matching": "matches",
    "cloze": "completes",
    "caption": "speaks",
    "vqa": "speaks",
    "reasoning": "judges",
    "conversation": "converses",
    "reconstruction": "reconstructs",
    "projection": "projects",
    "features": "represents",
    "agreement": "agrees",
    "classification": "classifies",
}
"""Each task, and the capability that it asks for, or which of several."""


def task(name: str) -> Any:
    """The module of a task; a ValueError for an unknown one tells the nearest."""
    if name not in TASKS:
        raise ValueError(f"the task must be one of {', '.join(TASKS)}, got {name!r}{did_you_mean(name, TASKS)}")
    return importlib.import_module(f"mmcore.tasks.{name}")


def _is_able(name: str, recipe: Any) -> bool:
    return any(hasattr(recipe, capability) for capability in TASKS[name].split(" or "))


def check_capability(name: str, recipe: Any, said: str) -> None:
    """Raise a ValueError unless a recipe has what a task asks for; it tells what the recipe can be measured by."""
    if not _is_able(name, recipe):
        able = [other for other in TASKS if _is_able(other, recipe)]
        what = f"{name} asks for a model that {TASKS[name]}, which {said} does not"
        raise ValueError(f"{what}; it can be measured by {', '.join(able) or 'nothing here'}")


def follow(subject: Subject) -> dict[str, float]:
    """The numbers of a recipe's own tasks while it trains, in [0, 1] unless their names say otherwise; none where
    nothing is held out. Under an engine, every rank alike."""
    found: dict[str, float] = {}
    for name in subject.recipe.tasks:
        found |= task(name).follow(subject)
    return found


def subject_of(trained: Trained, data: Any = None) -> Subject:
    """A run read back, on the GPU where there is one, with the data that it was trained on or other data."""
    data = trained.recipe.open_data() if data is None else data
    device = default_device()
    return Subject(trained.recipe, trained.assets, trained.model.to(device), data, device, trained.run)


def report(folder: Path, records: list[dict[str, Any]]) -> None:
    """What a finished run prints and draws: measured on its checkpoint, as `mmcore eval` would."""
    trained = read_run(folder)
    plot_curves(records, folder / "curves.png")
    written = [folder / "metrics.jsonl", folder / "curves.png"]
    subject = subject_of(trained)
    for name in trained.recipe.tasks:
        written += task(name).report(subject, None)
    print(f"measured on {WEIGHTS[trained.run.key]} of step {trained.run.step}; written:")
    for file in [*written, trained.run.checkpoint]:
        print(f"  {file}")
