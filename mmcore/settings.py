"""Settings: frozen dataclasses, nested or not, to and from JSON and YAML, and compared when a run is resumed."""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")

free = types.MappingProxyType({"free": True})
"""`field(metadata=free)`: may differ between a run and its continuation, since it does not change what is computed."""

once = types.MappingProxyType({"once": True})
"""`field(default=None, metadata=once)`: what a run starts from, whose folder then has it; a continuation may leave it
out, but not change it."""


def flag(name: str) -> str:
    """A field's name as on the command line."""
    return f"--{name.replace('_', '-')}"


def to_json(settings: Any) -> dict[str, Any]:
    """All settings as JSON holds them."""
    return to_json_value(asdict(settings))


def from_json(kind: type[T], saved: Mapping[str, Any]) -> T:
    """Settings from `to_json`; what was not known when they were saved has its default, what is no longer known is
    left out."""
    hints = get_type_hints(kind)
    known = [f for f in fields(kind) if f.init and f.name in saved]  # pyright: ignore[reportArgumentType]
    return kind(**{f.name: _value(hints[f.name], saved[f.name]) for f in known})


def _value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if is_dataclass(hint):
        return from_json(hint, value)  # pyright: ignore[reportArgumentType]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [x for x in arguments if x is not type(None)]
        # of several dataclasses the first that has all that was saved
        of_value = [x for x in kinds if is_dataclass(x) and value.keys() <= {f.name for f in fields(x)}]
        return _value((of_value or kinds)[0], value)
    if origin is tuple:
        kinds = arguments if Ellipsis not in arguments else arguments[:1] * len(value)
        return tuple(_value(kind, x) for kind, x in zip(kinds, value, strict=True))
    return Path(value) if hint is Path else value


def check_resumed(saved: Mapping[str, Any], now: Any) -> None:
    """Compares the settings of a run, as they were saved, with those of its continuation; raises ValueError where one
    that changes what is computed differs, with its name and both values."""
    current = to_json(now)
    for f in fields(now):
        value = getattr(now, f.name)
        if is_dataclass(value):
            check_resumed(saved.get(f.name, {}), value)
        elif not f.metadata.get("free"):
            new, old = current[f.name], saved.get(f.name, to_json_value(_default(f)))
            if old != new and not (new is None and f.metadata.get("once")):
                raise ValueError(f"{flag(f.name)} must be {old!r} as in the run that is resumed, got {new!r}")


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def with_values(kind: type, arguments: Sequence[str]) -> list[str]:
    """Arguments whose `--x` and `--no-x`, of settings that are True, False or None, are `--x True` and `--x False`."""
    choices = [flag(name) for name, hint in get_type_hints(kind).items() if hint == bool | None]
    out: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument in choices and following not in ("True", "False", "None"):
            out += [argument, "True"]
        elif argument.startswith("--no-") and (positive := f"--{argument.removeprefix('--no-')}") in choices:
            out += [positive, "False"]
        else:
            out.append(argument)
    return out


def flat(settings: Any) -> dict[str, Any]:
    """All settings by the names of their flags, without their groups."""
    found = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        found |= flat(value) if is_dataclass(value) else {_shown(f): to_json_value(value)}
    return found


def to_json_value(value: Any) -> Any:
    """A setting as JSON and YAML hold it."""
    return json.loads(json.dumps(value, default=str))


def _shown(f: Field[Any]) -> str:
    """The name on the command line, which a field's type may say."""
    return f.metadata.get("flag", f.name).replace("_", "-")


def with_yaml(settings: T, file: Path) -> T:
    """Settings with those that a YAML file gives by the names of their flags (`batch-size: 64`) or fields; raises
    ValueError for no such file, no mapping in it, an unknown name (the nearest is told), a value of another type."""
    if not file.is_file():
        raise ValueError(f"--config must be a YAML file, got {file}, which does not exist")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config must be a YAML file, got {file}: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"--config must hold names and values, got {type(given).__name__} in {file}")
    wanted = {str(name).replace("_", "-"): value for name, value in given.items()}
    known = flat(settings)
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"{file}: there is no setting {name!r}; the nearest is {near[0]!r}")
    return _filled(settings, wanted, file)


def _filled(settings: Any, wanted: Mapping[str, Any], file: Path) -> Any:
    hints, changed = get_type_hints(type(settings), include_extras=False), {}
    for f in fields(settings):
        value, name = getattr(settings, f.name), _shown(f)
        if is_dataclass(value):
            changed[f.name] = _filled(value, wanted, file)
        elif name in wanted:
            changed[f.name] = _typed(hints[f.name], wanted[name], f"{file}: {name}")
    return replace(settings, **changed)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """A value of YAML as a field has it."""
    for kind in _kinds(hint):
        if kind is type(None) and value is None:
            return None
        if get_origin(kind) is tuple and isinstance(value, list):
            return _value(kind, value)
        if get_origin(kind) is not None and value in get_args(kind):  # a Literal
            return value
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:  # YAML reads 1e-3 as text
                return float(value)
            except ValueError:
                continue
        if isinstance(kind, type) and type(value) is kind:
            return value
    raise ValueError(f"{where} must be {_said(hint)}, got {value!r}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _said(hint: Any) -> str:
    names = []
    for kind in _kinds(hint):
        values = get_args(kind)
        if kind is type(None):
            names.append("nothing")
        elif values and get_origin(kind) is not tuple:
            names.append("one of " + ", ".join(map(str, values)))
        else:
            names.append("a list" if get_origin(kind) is tuple else kind.__name__)
    return " or ".join(names)


def as_yaml(settings: Any) -> str:
    """All settings as a file that `with_yaml` reads."""
    return yaml.safe_dump(flat(settings), sort_keys=False, allow_unicode=True)
