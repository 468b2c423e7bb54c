"""Names of weights in other libraries' files: a table that is written and read by the same rows."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mmcore.ops import require


class Theirs(NamedTuple):
    """What a file has for a weight of ours: its name, how it is written and read, whether it may be missing."""

    name: str
    write: Callable[[Tensor], Tensor] = lambda x: x
    read: Callable[[Tensor], Tensor] = lambda x: x
    is_optional: bool = False


Rows = Mapping[str, "str | Theirs"]


def transposed(name: str) -> Theirs:
    """[in, out] there, [out, in] here."""
    return Theirs(name, lambda x: x.transpose(0, -1), lambda x: x.transpose(0, -1))


def scalar(name: str) -> Theirs:
    """0-d there, [1] here: DeepSpeed takes no 0-d parameters."""
    return Theirs(name, lambda x: x.reshape(()), lambda x: x.reshape(1) if x.ndim == 0 else x)


def leading(name: str, count: int) -> Theirs:
    """With `count` axes of size 1 there before the axes here."""
    ones = (1,) * count
    return Theirs(
        name,
        lambda x: x.reshape(ones + x.shape),
        lambda x: x.reshape(x.shape[count:]) if x.shape[:count] == ones else x,
    )


def optional(name: str) -> Theirs:
    """Is always written; where a file has none, the model keeps its initial value."""
    return Theirs(name, is_optional=True)


def under(ours: str, theirs: str, rows: Rows) -> dict[str, Theirs]:
    """The rows of a part, under its names here and there."""
    return {f"{ours}.{n}": x._replace(name=f"{theirs}.{x.name}") for n, x in _whole(rows).items()}


def _whole(rows: Rows) -> dict[str, Theirs]:
    return {n: Theirs(x) if isinstance(x, str) else x for n, x in rows.items()}


def _listed(name: str) -> list[str]:
    """`{q,k}_proj` as `q_proj` and `k_proj`; `{i}` is not a list."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", name)
    return [name[: found.start()] + x + name[found.end() :] for x in found[1].split(",")] if found else [name]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Pair(NamedTuple):
    """Weights of ours whose rows, one after the other, are those of theirs."""

    ours: list[str]
    theirs: list[str]
    how: Theirs


@dataclass(frozen=True)
class Layout:
    """What a library calls the weights of a model of ours.

    `tied` are our names of weights that are another of ours: not written, and read from that one. `unread` are their
    names, or beginnings of them before a dot, that a file may have and our model does not need. `older` is what names
    in other files begin with, and what stands there in this layout; replaced in this order.
    """

    rows: Rows  # our names and theirs, as CONTRIBUTING.md explains
    tied: Mapping[str, str] = field(default_factory=dict)
    unread: Sequence[str] = ()
    older: Sequence[tuple[str, str]] = ()
    what: str = "a transformers file"  # in errors

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names, on the CPU, each in memory of its own."""
        out = {}
        for ours, theirs, how in self.pairs(state):
            x = torch.cat([state[n] for n in ours]) if len(ours) > 1 else state[ours[0]]
            parts = x.detach().cpu().chunk(len(theirs)) if len(theirs) > 1 else [x.detach().cpu()]
            for name, part in zip(theirs, parts, strict=True):
                out[name] = how.write(part).clone(memory_format=torch.contiguous_format)
        return out

    def read(
        self, op: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, unread: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Their weights `state` under our names, with the names, shapes and dtypes of `wanted`, the model's, which may
        be on the meta device; `unread` is besides the layout's own. A ValueError of missing or unknown names, and of
        other shapes."""
        state, pairs = self.renamed(state), list(self.pairs(wanted))
        missing = [n for pair in pairs for n in pair.theirs if n not in state and not pair.how.is_optional]
        require(op, not missing, "{} must hold every weight of the model, missing {}", self.what, _some(missing))
        known = {n for pair in pairs for n in pair.theirs}
        skipped = tuple(f"{n}." for n in (*self.unread, *unread))
        unknown = sorted(n for n in state if n not in known and not f"{n}.".startswith(skipped))
        what = "{} must hold this model's weights only, got also {}"
        require(op, not unknown, what, self.what, _some(unknown))
        out = {}
        for ours, theirs, how in (pair for pair in pairs if pair.theirs[0] in state):
            x, shape = [], wanted[ours[0]].shape
            rows = [len(wanted[n]) for n in ours] if len(ours) + len(theirs) > 2 else []
            shape = torch.Size((sum(rows) // len(theirs), *shape[1:])) if rows else shape
            for name in theirs:
                x.append(how.read(state[name]))
                expected = list(how.write(torch.empty(shape, device="meta")).shape)
                what = "{} must hold {} of shape {}, got {}"
                require(op, x[-1].shape == shape, what, self.what, name, expected, list(state[name].shape))
            x = torch.cat(x) if len(x) > 1 else x[0]
            for name, part in zip(ours, x.split(rows) if len(ours) > 1 else [x]):
                out[name] = part.to(wanted[name].dtype).contiguous()
        return out | {n: out[source] for n, source in self.tied.items() if n in wanted}

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights with the names that this layout has for older ones."""
        out = {}
        for name, x in state.items():
            for old, new in self.older:
                name = new + name.removeprefix(old) if name.startswith(old) else name
            out[name] = x
        return out

    def pairs(self, names: Iterable[str]) -> Iterator[Pair]:
        """What belongs together, here and there; a KeyError for a name without a row."""
        found = (self._pair(name) for name in names if name not in self.tied)
        return (pair for pair in found if pair)

    def _pair(self, name: str) -> Pair | None:
        """None where the first of several of ours stands for them."""
        for pattern, is_first, ours, theirs, how in self._patterns:
            if found := pattern.fullmatch(name):
                values = found.groupdict()
                ours, theirs = ([x.format(**values) + values["rest"] for x in side] for side in (ours, theirs))
                return Pair(ours, theirs, how) if is_first else None
        raise KeyError(f"rows must have one for {name}")

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], bool, list[str], list[str], Theirs]]:
        out = []
        # what is longer says more
        for ours, how in sorted(_whole(self.rows).items(), key=lambda row: -len(row[0])):
            for i, one in enumerate(_listed(ours)):
                pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(one)) + r"(?P<rest>(\..+)?)"
                out.append((re.compile(pattern), i == 0, _listed(ours), _listed(how.name), how))
        return out
