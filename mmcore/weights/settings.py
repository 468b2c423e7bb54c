"""Settings in other libraries' files: a table that is written and read by the same rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmcore.ops import require
from mmcore.weights.pictures import RULES

# settings that transformers has other names for
_TRANSFORMERS = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "context_length": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
# of a setting in a file and its default
_ALIKE = {(kind, kind) for kind in (bool, int, float, str, tuple)}
_ALIKE |= {(int, float), (list, tuple), (type(None), int)}


class Key(NamedTuple):
    """What a file has for a setting of ours: `read` makes ours of their value and the settings of ours that are read
    before it, `write` theirs of our value and all settings of ours, `...` to leave it out."""

    name: str  # theirs, dotted
    default: Any = ...  # theirs where a file leaves it out; `...` = none does
    read: Callable[[Any, Mapping[str, Any]], Any] = lambda x, _: x
    write: Callable[[Any, Mapping[str, Any]], Any] = lambda x, _: x


def transformers_keys(**defaults: Any) -> dict[str, Key]:
    """Settings of ours by transformers' names, with its defaults."""
    return {name: Key(_TRANSFORMERS.get(name, name), default) for name, default in defaults.items()}


def section(ours: str, theirs: str, keys: Mapping[str, Key]) -> dict[str, Key]:
    """The rows of a part, in its sections here and there."""
    return {f"{ours}.{n}": key._replace(name=f"{theirs}.{key.name}") for n, key in keys.items()}


@dataclass(frozen=True)
class Settings:
    """What a library calls the settings of a model of ours.

    `current` gives what a file holds as files hold it today; `plain` our settings with one value for those that mean
    the same, and defaults for those that no file tells.
    """

    keys: Mapping[str, Key]  # our settings, dotted, and theirs; one without a row must have its default here
    kind: Callable[..., Any] = dict  # of our settings, a dataclass or a dict
    kinds: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # the dataclasses of sections of ours
    model_types: tuple[str, ...] = ()  # one of which a file must tell; () = it tells none
    must: Mapping[str, Any] = field(default_factory=dict)  # what a file must have where it has it
    written: Mapping[str, Any] = field(default_factory=dict)  # what else is; a function is given our settings, dotted
    allowed: tuple[str, ...] | None = None  # the other settings that a file may have, or sections of them; None = any
    what: str = "config.json"  # the file, in errors
    current: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda raw: raw
    plain: Callable[[Any], Any] = lambda config: config

    def check(self, op: str, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A file's settings, dotted; a ValueError for another model type, or a setting that our model does not have."""
        theirs, what = _flat(self.current(raw)), self.what
        model_type, known = theirs.get("model_type"), " or ".join(map(repr, self.model_types))
        is_known = not known or model_type in self.model_types
        require(op, is_known, "{} must have model_type {}, got {!r}", what, known, model_type)
        for name, wanted in self.must.items():
            value = theirs.get(name, wanted)
            require(op, value == wanted, "{} must have {} {!r}, got {!r}", what, name, wanted, value)
        if self.allowed is not None:
            named = tuple(f"{n}." for n in (*(key.name for key in self.keys.values()), *self.allowed))
            others = {n: x for n, x in theirs.items() if x and not f"{n}.".startswith(named)}
            require(op, not others, "{} must have this model's settings only, got also {}", what, others)
        return theirs

    def read(self, op: str, raw: Mapping[str, Any]) -> Any:
        """Our settings of a file's; errors as of `check`, or where one that every file has is missing."""
        theirs = self.check(op, raw)
        ours: dict[str, Any] = {}
        for name, key in self.keys.items():
            value = theirs.get(key.name, key.default)
            require(op, value is not ..., "{} must have {}, got none", self.what, key.name)
            is_like = key.default in (None, ...) or (type(value), type(key.default)) in _ALIKE
            sentence = "{} must have {} such as {!r}, got {!r}"
            require(op, is_like, sentence, self.what, key.name, key.default, value)
            ours[name] = key.read(value, ours)
        return self.kind(**{n: self.kinds[n](**x) if n in self.kinds else x for n, x in _nested(ours).items()})

    def write(self, op: str, config: Any) -> dict[str, Any]:
        """What a file holds for our settings; a ValueError for one that it could not be read back as."""
        ours = self._dotted(self.plain(config))
        theirs = {key.name: key.write(ours[name], ours) for name, key in self.keys.items()}
        theirs |= {name: x(ours) if callable(x) else x for name, x in self.written.items()}
        raw = _nested({name: x for name, x in theirs.items() if x is not ...})
        for name, value in self._dotted(self.read(op, raw)).items():
            is_elsewhere = name not in self.keys and name.split(".")[-1] in RULES  # see `weights.pictures`
            what = "{} must be {!r} to be written in {}, got {!r}"
            require(op, is_elsewhere or value == ours[name], what, name, value, self.what, ours[name])
        return raw

    def export_summary(self, config: Any) -> dict[str, str]:
        """For the reader, before hours of training: why a model of this shape cannot be exported, if it cannot."""
        try:
            self.write("export", config)
        except ValueError as error:
            return {"export": f"there will be none to transformers: {str(error).removeprefix('export: ')}"}
        return {}

    def _dotted(self, config: Any) -> dict[str, Any]:
        parts = config if isinstance(config, dict) else vars(config)
        return _flat({name: vars(x) if name in self.kinds else x for name, x in parts.items()})


def _flat(nested: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    out = {}
    for name, x in nested.items():
        out |= _flat(x, f"{start}{name}.") if isinstance(x, Mapping) else {f"{start}{name}": x}
    return out


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, x in flat.items():
        *path, last = name.split(".")
        place = out
        for part in path:
            place = place.setdefault(part, {})
        place[last] = x
    return out
