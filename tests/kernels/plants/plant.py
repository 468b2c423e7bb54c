"""Planting a bug: a path's module made anew from its source with one text replaced."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from mmkernels._spec import OpSpec, Shape

# the files of an op that may hold kernels
DEVICE = ("device", "device_bwd")


@dataclass(frozen=True)
class Plants:
    """An op's bugs.

    Attributes:
        op: its `op` module, which holds each path under the path's name.
        paths: the modules "blockwise" and "kernel".
        bugs: by path, by name, the text in the path's source and what replaces it.
        checks: the contract that must turn red: specs and shapes, in float32 and bfloat16.
        cases: the data of those; if none, each spec's plainest.
    """

    op: ModuleType
    paths: Mapping[str, ModuleType]
    bugs: Mapping[str, Mapping[str, tuple[str, str]]]
    checks: tuple[tuple[OpSpec, Shape], ...]
    cases: tuple[str, ...] = ()


def plant(path: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The path's module again, with `old` replaced by `new` in its source, or in that of the module that holds
    its kernels (`DEVICE`); its own values otherwise, the small tiles too."""
    if old in _source(path):
        return _again(path, old, new, folder)
    package = str(path.__package__)
    modules = [import_module(f"{package}.{name}") for name in DEVICE if find_spec(f"{package}.{name}")]
    device = next((module for module in modules if old in _source(module)), None)
    assert device is not None, "the planted bug has lost its place in the source"
    planted, module = _again(device, old, new, folder), _again(path, "", "", folder)
    for name, value in vars(device).items():
        if name.endswith("_kernel") and vars(path).get(name) is value:
            setattr(module, name, getattr(planted, name))
    return module


def _source(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text()


def _again(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    name = f"planted_{module.__name__.rpartition('.')[2]}"
    file = folder / f"{name}.py"
    file.write_text(_source(module).replace(old, new) if old else _source(module))
    module_spec = importlib.util.spec_from_file_location(name, file)
    assert module_spec is not None and module_spec.loader is not None
    again = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(again)
    # the streamed fixture has made the module's own tiles small
    vars(again).update(
        {name: vars(module)[name] for name in vars(again) if name.isupper() or name == "chunk_rows"}
    )
    return again
