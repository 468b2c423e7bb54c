"""Systems, found by themselves: a folder each here, and other packages by entry points of the group `mmcore.systems`.

A system's `__init__` holds strings alone, so that all are listed without importing torch:

```
RECIPES = {"siglip": "recipe:Siglip"}  # mmcore train siglip
FOLDERS = {"siglip": "weights:load_siglip"}  # model_type of a config.json, or a part of open_clip's -> what loads it
FILES = {"beit": "weights:published_tower"}  # the tower of what a file as published holds, None of others
TOWERS = {"blip-2": "weights:load_blip2_tower"}  # where a folder's tower is read without the rest
CHATS = {"llava": "talk:model_of_folder"}  # model_type -> what makes a model of it to talk to, mmcore chat
PLANS = {"clip": "plan:ClipPlan"}  # where depth has to be extrapolated, mmcore plan clip
PROOFS = {"siglip": "recipe:PROOF"}  # mmcore prove siglip
```
"""

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args

from mmcore.errors import did_you_mean

Kind = Literal["RECIPES", "FOLDERS", "FILES", "TOWERS", "CHATS", "PLANS", "PROOFS"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUP = "mmcore.systems"


@dataclass(frozen=True)
class Entry:
    """Something that a system gives, by the name that it is asked for."""

    name: str
    package: str
    """The system's, such as "mmcore.systems.clip"."""
    target: str
    """Module and attribute in it, such as "recipe:Clip"."""

    def load(self) -> Any:
        """Imports it; a ValueError where the system cannot be imported, or has no such thing."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise ValueError(f"{self.name!r} of {self.package} cannot be imported: {error}") from error

    @property
    def summary(self) -> str:
        """The first line of its docstring, read from the source: nothing is imported."""
        module, _, attribute = self.target.partition(":")
        package = importlib.util.find_spec(self.package)
        for folder in (package and package.submodule_search_locations) or ():
            file = Path(folder, *module.split(".")).with_suffix(".py")
            if file.is_file():
                for node in ast.parse(file.read_text(encoding="utf-8")).body:
                    if isinstance(node, ast.ClassDef) and node.name == attribute:
                        return (ast.get_docstring(node) or "").partition("\n")[0]
        return ""


@dataclass
class Found:
    """What all systems give, and which of them cannot be imported, with the reason."""

    entries: dict[Kind, dict[str, Entry]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    broken: dict[str, str] = field(default_factory=dict)
    twice: dict[tuple[Kind, str], tuple[str, str]] = field(default_factory=dict)


@cache
def find_systems() -> Found:
    """Looks at every system once."""
    found = Found()
    own = (f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__) if module.ispkg)
    for package in [*own, *sorted({point.value for point in entry_points(group=GROUP)})]:
        try:
            module = importlib.import_module(package)
        except Exception as error:  # noqa: BLE001 (a package of others may fail as it likes: it is named, the rest works)
            found.broken[package] = f"{type(error).__name__}: {error}"
            continue
        for kind, entries in found.entries.items():
            for name, target in getattr(module, kind, {}).items():
                if name in entries:
                    found.twice[kind, name] = entries[name].package, package
                entries.setdefault(name, Entry(name, package, target))
    return found


def entries(kind: Kind) -> Mapping[str, Entry]:
    """All of a kind, by name; a ValueError where two packages claim one."""
    found = find_systems()
    for (of_kind, name), (first, second) in found.twice.items():
        if of_kind == kind:
            raise ValueError(f"the name {name!r} must be of one system, but {first} and {second} claim it")
    return found.entries[kind]


def recipe_entry(name: str) -> Entry:
    """The recipe of a name; a ValueError for an unknown one tells the nearest."""
    known = entries("RECIPES")
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, 3)
    broken = "".join(f"; {p} cannot be imported: {why}" for p, why in find_systems().broken.items())
    raise ValueError(f"the recipe must be one of {', '.join(known)}, got {name!r}{hint}{broken}")
