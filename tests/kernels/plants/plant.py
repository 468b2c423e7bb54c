"""Planting a bug: a path's module made anew from its source with one text replaced."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mmkernels._spec import OpSpec, Shape


@dataclass(frozen=True)
class Plants:
    """An op's bugs.

    Attributes:
        op: its `op` module, which holds each path under the path's name.
        paths: the modules "blockwise" and "kernel".
        bugs: by path, by name, the text in the path's source and what replaces it.
        checks: the contract that must turn red: specs and shapes, on random data in float32 and bfloat16.
    """

    op: ModuleType
    paths: Mapping[str, ModuleType]
    bugs: Mapping[str, Mapping[str, tuple[str, str]]]
    checks: tuple[tuple[OpSpec, Shape], ...]


def plant(path: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The path's module again, with `old` replaced by `new`; its own values otherwise, the small tiles too."""
    source = Path(str(path.__file__)).read_text()
    assert source.count(old) >= 1, "the planted bug has lost its place in the source"
    file = folder / "planted.py"
    file.write_text(source.replace(old, new))
    module_spec = importlib.util.spec_from_file_location("planted", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    vars(module).update(
        {name: vars(path)[name] for name in vars(module) if name.isupper() or name == "chunk_rows"}
    )
    return module
