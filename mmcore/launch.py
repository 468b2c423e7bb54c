"""The command line of training: flags from the recipe (tyro), one sentence for a user's mistake, a clean exit."""

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from mmcore.errors import complain
from mmcore.systems import entries, find_systems, recipe_entry

CONFIG = "--config"


def listing(verb: str) -> str:
    """Every recipe with a line of what it does; nothing of them is imported."""
    known = entries("RECIPES")
    width = max(map(len, known), default=0)
    lines = [f"usage: mmcore {verb} RECIPE [options]; mmcore {verb} RECIPE --help explains every option", ""]
    lines += [f"  {name:{width}}  {entry.summary}" for name, entry in known.items()]
    lines += [f"  {package} cannot be imported: {why}" for package, why in find_systems().broken.items()]
    return "\n".join(lines)


def parse(name: str, arguments: list[str], prog: str) -> Any:
    """A recipe by its name and flags, and by those of a YAML file of `--config`, which flags override; a ValueError of
    an unknown recipe, or a mistake in the file."""
    kind = recipe_entry(name).load()
    tyro, settings = importlib.import_module("tyro"), importlib.import_module("mmcore.settings")
    arguments, options = list(arguments), {}
    if CONFIG in arguments:
        place = arguments.index(CONFIG)
        if place + 1 == len(arguments):
            raise ValueError(f"{CONFIG} must be followed by a YAML file, got nothing")
        options["default"] = settings.with_yaml(kind(), Path(arguments[place + 1]))
        del arguments[place : place + 2]
    arguments = settings.with_values(kind, arguments)
    about = f"{(kind.__doc__ or '').strip()} {CONFIG} FILE: settings from YAML by these names, which flags override."
    return tyro.cli(kind, args=arguments, prog=prog, description=about, config=(tyro.conf.OmitArgPrefixes,), **options)


def main(arguments: list[str]) -> None:
    """Runs `clip ...`; exits with 2 for a user's mistake, 1 where training had to stop.

    The process ends by `os._exit` once everything is on disk: under ZeRO-3 the interpreter's own exit sometimes
    aborts after the work is done.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing("train"))
        return
    code = 0
    try:
        recipe = parse(arguments[0], arguments[1:], f"mmcore train {arguments[0]}")
        importlib.import_module("mmcore.train.trainer").train(arguments[0], recipe)
    except (ValueError, OSError, FloatingPointError) as error:
        code = complain(error, 1 if isinstance(error, FloatingPointError) else 2)
    leave(code)


def leave(code: int) -> None:
    """Ends the process, of several ranks all together."""
    sys.stdout.flush()
    sys.stderr.flush()
    dist = importlib.import_module("torch.distributed")
    if code == 0 and dist.is_initialized():
        dist.barrier()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
