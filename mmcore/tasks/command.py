"""`mmcore eval TASK RUN`."""

import ast
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmcore.runs import WeightsKey, find_run, read_run
from mmcore.systems import recipe_entry
from mmcore.tasks import TASKS, check_capability, subject_of, task


@dataclass(frozen=True)
class EvalConfig:
    """Measure a run on its held-out data."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its newest checkpoint is used), or one checkpoint of it."""
    weights: WeightsKey = "auto"
    """ema = the averaged weights, teacher = a momentum teacher's, weight = the trained ones, auto = ema where the run
    kept one, else the teacher's of a system that is measured by it."""


def listing() -> str:
    """Every task with a line of what it does."""
    lines = ["usage: mmcore eval TASK RUN [options]; mmcore eval TASK --help explains every option", ""]
    for name in TASKS:
        text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        lines.append(f"  {name:14}  {(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Runs `TASK RUN ...`; a ValueError for an unknown task, one that the model has no capability for, or a mistake."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(listing())
        return
    if not arguments:
        raise ValueError(f"mmcore eval must be followed by one of {', '.join(TASKS)}, got nothing")
    module, kind = task(arguments[0]), EvalConfig
    if hasattr(module, "Options"):
        inner: Any = Annotated[module.Options, tyro.conf.arg(name="")]
        options = [("options", inner, field(default_factory=module.Options))]
        kind = make_dataclass("EvalConfig", options, bases=(EvalConfig,), frozen=True)
        kind.__doc__ = module.__doc__
    config: Any = tyro.cli(kind, args=arguments[1:], prog=f"mmcore eval {arguments[0]}")
    run, options = find_run(config.run, config.weights), getattr(config, "options", config)
    check_capability(arguments[0], recipe_entry(run.recipe).load(), f"a run of {run.recipe}")
    data = options.held_out() if hasattr(options, "held_out") else None
    trained = read_run(config.run, config.weights, llm=getattr(options, "llm", None))
    for file in module.report(subject_of(trained, data), options):
        print(f"  {file}")
