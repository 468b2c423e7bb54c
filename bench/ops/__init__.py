"""A module an op: its entries in the contract test, its benchmarks beside other contenders, what is claimed of them."""

import pkgutil
from importlib import import_module
from types import ModuleType

from bench.spec import OpSpec


def modules() -> dict[str, ModuleType]:
    """All of them, by name."""
    return {found.name: import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)}


def specs() -> tuple[OpSpec, ...]:
    """What the contract test runs."""
    return tuple(spec for module in modules().values() for spec in getattr(module, "SPECS", ()))
